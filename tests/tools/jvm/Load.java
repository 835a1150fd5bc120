// A JVM as a workload for measurements: threads, a garbage collector that works, and memory that can be checked. Run from source
// (`java Load.java MB`): the compiler is in Debian's headless runtime. Speaks ts-load's protocol on port 7000 (tests/tools/src/bin/ts-load):
// status, reset, verify; one command a connection.
//
// Every block of 64 KiB carries a version and content that follows from its index and version. A thread replaces blocks at random by new
// objects, 1000 a second, so that the old ones become garbage; the pace is watched by another thread, which measures stalls by the wall clock.

import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.net.ServerSocket;
import java.net.Socket;
import java.util.Arrays;
import java.util.SplittableRandom;

public class Load {
    static final int WORDS = 8192;
    static long[][] blocks;
    static int[] versions;
    static long writes;
    static double longestMs, longestEnd;

    static long word(long index, long version, int i) {
        long z = (index << 32 | version) * 0x9E3779B97F4A7C15L + i;
        z = (z ^ (z >>> 32)) * 0xD6E8FEB86659FD93L;
        return z ^ (z >>> 29);
    }

    static synchronized void write(int index) {
        versions[index]++;
        writes++;
        long[] block = new long[WORDS];
        for (int i = 0; i < WORDS; i++) block[i] = word(index, versions[index], i);
        blocks[index] = block;
    }

    static synchronized int wrong() {
        int wrong = 0;
        for (int b = 0; b < blocks.length; b++) {
            for (int i = 0; i < WORDS; i++) {
                if (blocks[b][i] != word(b, versions[b], i)) {
                    wrong++;
                    break;
                }
            }
        }
        return Arrays.stream(versions).asLongStream().sum() == writes ? wrong : wrong + 1;
    }

    static double now() {
        java.time.Instant t = java.time.Instant.now();
        return t.getEpochSecond() + t.getNano() / 1e9;
    }

    static synchronized void stall(double ms, double end) {
        if (ms > longestMs) {
            longestMs = ms;
            longestEnd = end;
        }
    }

    static synchronized String answer(String command) {
        switch (command) {
            case "reset":
                longestMs = 0;
                return "{\"ok\": true}";
            case "verify":
                return "{\"wrong\": " + wrong() + ", \"named\": []}";
            default:
                return String.format(java.util.Locale.ROOT, "{\"longest\": {\"ms\": %.3f, \"realtime_end\": %.6f}}", longestMs, longestEnd);
        }
    }

    static void daemon(Runnable body) {
        Thread thread = new Thread(body);
        thread.setDaemon(true);
        thread.start();
    }

    public static void main(String[] args) throws Exception {
        int count = Integer.parseInt(args[0]) * 16;
        blocks = new long[count][];
        versions = new int[count];
        for (int b = 0; b < count; b++) write(b);
        daemon(() -> {
            SplittableRandom random = new SplittableRandom(1);
            while (true) {
                write(random.nextInt(count));
                java.util.concurrent.locks.LockSupport.parkNanos(1_000_000);
            }
        });
        daemon(() -> {
            double last = now();
            while (true) {
                java.util.concurrent.locks.LockSupport.parkNanos(1_000_000);
                double at = now();
                stall((at - last) * 1e3, at);
                last = at;
            }
        });
        try (ServerSocket server = new ServerSocket(7000)) {
            while (true) {
                try (Socket socket = server.accept()) {
                    String line = new BufferedReader(new InputStreamReader(socket.getInputStream())).readLine();
                    if (line != null) socket.getOutputStream().write((answer(line.trim()) + "\n").getBytes());
                } catch (java.io.IOException e) {
                    // the asker went away
                }
            }
        }
    }
}
