//! What a stdio string of containerd means. Pure; nothing is opened here.
//!
//! Rules of containerd's own shim (`cmd/containerd-shim-runc-v2/process/io.go`): no scheme is a path; `file://` appends;
//! `binary://PROGRAM?key=value` starts a logging program with the arguments `key value`; `binary-v2` wants it to say that it is ready.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

/// Where a stream goes to or comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nowhere: the string was empty.
    None,
    /// A FIFO, or a file that exists.
    Path(PathBuf),
    /// A file to append to; it and its directory are created.
    File(PathBuf),
    /// A logging program.
    Binary(Program),
}

/// A logging program as its URI names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Path of the program.
    pub path: PathBuf,
    /// Its arguments: each key of the query and the key's first value, in the order of the URI.
    pub args: Vec<OsString>,
    /// `binary-v2`: the program must write a byte to its ready pipe; for `binary` closing it is enough.
    pub must_say_ready: bool,
}

/// Reads one stdio string.
pub fn parse(text: &str) -> Result<Target> {
    if text.is_empty() {
        return Ok(Target::None);
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok(Target::Path(PathBuf::from(text)));
    };
    if text.starts_with('/') {
        return Ok(Target::Path(PathBuf::from(text)));
    }
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let path = PathBuf::from(decode(path, false)?);
    if !path.is_absolute() {
        bail!("stdio URI {text:?} has no absolute path");
    }
    match scheme {
        "fifo" => Ok(Target::Path(path)),
        "file" => Ok(Target::File(path)),
        "binary" | "binary-v2" => Ok(Target::Binary(Program {
            path: Path::new(&path).to_path_buf(),
            args: arguments(query)?,
            must_say_ready: scheme == "binary-v2",
        })),
        other => bail!("unknown stdio scheme {other:?} in {text:?}"),
    }
}

/// `a=1&b=2&a=3` as `a 1 b 2`.
fn arguments(query: &str) -> Result<Vec<OsString>> {
    let mut args: Vec<OsString> = Vec::new();
    for pair in query.split('&').filter(|p| !p.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = decode(key, true)?;
        if args.iter().step_by(2).any(|known| *known == key) {
            continue;
        }
        args.push(key);
        args.push(decode(value, true)?);
    }
    Ok(args)
}

/// Percent-decoding; in a query `+` is a space.
fn decode(text: &str, query: bool) -> Result<OsString> {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        match b {
            b'+' if query => out.push(b' '),
            b'%' => {
                let mut digit = || bytes.next().and_then(|d| (d as char).to_digit(16));
                match (digit(), digit()) {
                    (Some(high), Some(low)) => out.push((high * 16 + low) as u8),
                    _ => bail!("bad percent escape in stdio URI part {text:?}"),
                }
            }
            b => out.push(b),
        }
    }
    Ok(OsString::from_vec(out))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_of_containerd() {
        assert_eq!(parse("").unwrap(), Target::None);
        assert_eq!(parse("/run/x/1-stdout").unwrap(), Target::Path("/run/x/1-stdout".into()));
        assert_eq!(parse("/odd/a://b").unwrap(), Target::Path("/odd/a://b".into()));
        assert_eq!(parse("fifo:///run/f").unwrap(), Target::Path("/run/f".into()));
        assert_eq!(parse("file:///var/log/a%20b.log").unwrap(), Target::File("/var/log/a b.log".into()));
        assert!(parse("gopher:///x").is_err());
        assert!(parse("file://relative/x").is_err());
        assert!(parse("file:///a%2").is_err());
    }

    #[test]
    fn logging_program() {
        let Target::Binary(p) = parse("binary:///usr/bin/log?id=a%2Fb+c&flag&id=second").unwrap() else {
            panic!("not a program");
        };
        assert_eq!(p.path, PathBuf::from("/usr/bin/log"));
        assert_eq!(p.args, ["id", "a/b c", "flag", ""]);
        assert!(!p.must_say_ready);
        assert!(
            matches!(parse("binary-v2:///x").unwrap(), Target::Binary(p) if p.must_say_ready && p.args.is_empty())
        );
    }
}
