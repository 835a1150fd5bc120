/* The container's process in the proof: memory of several kinds, a TCP connection, pipes as stdio, a deleted file.
 * hog MB: serves lines "N\n" on port 7000 with "N SUM\n", where SUM is over memory that each request changes. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static unsigned long sum(const unsigned long *p, size_t bytes)
{
	unsigned long s = 0;
	for (size_t i = 0; i < bytes / sizeof *p; i += 64)
		s = s * 31 + p[i];
	return s;
}

int main(int argc, char **argv)
{
	size_t size = (argc > 1 ? atoi(argv[1]) : 4) << 20, small = 1 << 20;
	unsigned long *heap = mmap(0, size, 3, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	unsigned long *shared = mmap(0, small, 3, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	unsigned long *sysv = shmat(shmget(IPC_PRIVATE, small, 0600), 0, 0);
	for (size_t i = 0; i < size / 8; i++)
		heap[i] = i * 2654435761u + 1;
	for (size_t i = 0; i < small / 8; i++)
		shared[i] = i ^ 0x5555, sysv[i] = i ^ 0xaaaa;
	int gone = open("/tmp/gone", O_RDWR | O_CREAT, 0600);
	write(gone, "still here", 10);
	unlink("/tmp/gone");
	int pair[2];
	socketpair(AF_UNIX, SOCK_STREAM, 0, pair);
	if (fork() == 0) {
		for (;; usleep(5000))
			__atomic_add_fetch(&shared[0], 1, 5), write(1, ".", 1);
	}
	int l = socket(AF_INET, SOCK_STREAM, 0), one = 1;
	setsockopt(l, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	struct sockaddr_in a = { .sin_family = AF_INET, .sin_port = htons(7000) };
	bind(l, (void *)&a, sizeof a);
	listen(l, 5);
	int c = accept(l, 0, 0);
	FILE *f = fdopen(c, "r+");
	char line[64], text[11] = "";
	while (fgets(line, sizeof line, f)) {
		unsigned long n = strtoul(line, 0, 10);
		heap[(n * 7919 * 512) % (size / 8)] += n;
		shared[64 + n % 100] += n;
		sysv[64 + n % 100] += n;
		write(pair[0], "x", 1);
		read(pair[1], text, 1);
		pread(gone, text, 10, 0);
		fseek(f, 0, SEEK_CUR);
		fprintf(f, "%lu %lu %s\n", n, sum(heap, size) + sum(shared + 64, small - 512) + sum(sysv, small), text);
		fflush(f);
	}
	return 3;
}
