//! How CRIU calls `tar`. Nothing here allocates or needs a C library: the program `transship-quick` has neither.

/// What CRIU asks for (criu/filesystems.c).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Job<'a> {
    /// Archive this directory to stdout.
    Create(&'a [u8]),
    /// Extract stdin into this directory.
    Extract(&'a [u8]),
}

/// None for anything but CRIU's two calls. Without the program's name.
pub fn job<'a>(mut args: impl Iterator<Item = &'a [u8]>) -> Option<Job<'a>> {
    let (mut create, mut extract, mut all, mut directory) = (false, false, false, None);
    while let Some(arg) = args.next() {
        match arg {
            b"--create" => create = true,
            b"--extract" => extract = true,
            b"--directory" => directory = args.next(),
            b"." => all = true,
            b"--gzip"
            | b"--no-unquote"
            | b"--no-wildcards"
            | b"--one-file-system"
            | b"--check-links"
            | b"--preserve-permissions"
            | b"--sparse"
            | b"--numeric-owner" => {}
            _ => return None,
        }
    }
    match (create, extract, all) {
        (true, false, true) => directory.map(Job::Create),
        (false, true, false) => directory.map(Job::Extract),
        _ => None,
    }
}
