//! A folder of files over plain TCP, as fast as the machine does it: what rsync or tar over nc would do for the peers, without
//! compression, encryption or a look at what is there already.
//!
//! Stream: for each file its name's length (u32), the name, its size (u64), its bytes; ends with a length of 0; the receiver
//! answers with one byte when everything has been written.

use std::fs::File;
use std::io::{Error, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;

const CHUNK: usize = 1 << 20;

fn files(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_file() {
            names.push(entry.file_name().into_string().map_err(|n| Error::other(format!("{n:?}")))?);
        }
    }
    names.sort();
    Ok(names)
}

/// Sends the regular files of `dir`, returns how many bytes they have.
pub fn send(dir: &Path, to: &str) -> Result<u64> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_nodelay(true)?;
    let mut total = 0;
    for name in files(dir)? {
        let mut file = File::open(dir.join(&name))?;
        let size = file.metadata()?.len();
        stream.write_all(&(name.len() as u32).to_le_bytes())?;
        stream.write_all(name.as_bytes())?;
        stream.write_all(&size.to_le_bytes())?;
        // the library uses sendfile here: no copy through this process
        let sent = std::io::copy(&mut Read::by_ref(&mut file).take(size), &mut stream)?;
        if sent != size {
            return Err(Error::other(format!("{name} became shorter")));
        }
        total += size;
    }
    stream.write_all(&0u32.to_le_bytes())?;
    stream.read_exact(&mut [0])?;
    Ok(total)
}

/// Takes what one sender sends into `dir`.
pub fn receive(listener: &TcpListener, dir: &Path) -> Result<u64> {
    let (mut stream, _) = listener.accept()?;
    let mut buffer = vec![0; CHUNK];
    let mut total = 0;
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length) as usize;
        if length == 0 {
            break;
        }
        let mut name = vec![0; length.min(255)];
        stream.read_exact(&mut name)?;
        let name = String::from_utf8(name).map_err(Error::other)?;
        if name.contains('/') {
            return Err(Error::other(format!("{name:?} is no file name")));
        }
        let mut size = [0; 8];
        stream.read_exact(&mut size)?;
        let mut left = u64::from_le_bytes(size);
        total += left;
        let mut file = File::create(dir.join(name))?;
        while left > 0 {
            let n = stream.read(&mut buffer[..(left.min(CHUNK as u64)) as usize])?;
            if n == 0 {
                return Err(Error::other("the sender went away"));
            }
            file.write_all(&buffer[..n])?;
            left -= n as u64;
        }
    }
    stream.write_all(&[0])?;
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_arrives_as_it_was() {
        let base = std::env::temp_dir().join(format!("ts-bench-copy-{}", std::process::id()));
        let (from, to) = (base.join("from"), base.join("to"));
        std::fs::create_dir_all(&from).unwrap();
        std::fs::create_dir_all(&to).unwrap();
        std::fs::write(from.join("empty"), b"").unwrap();
        let big: Vec<u8> = (0..3_000_001u32).map(|i| (i * 7) as u8).collect();
        std::fs::write(from.join("pages-1.img"), &big).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let receiver = std::thread::spawn({
            let to = to.clone();
            move || receive(&listener, &to).unwrap()
        });
        assert_eq!(send(&from, &address).unwrap(), big.len() as u64);
        assert_eq!(receiver.join().unwrap(), big.len() as u64);
        assert_eq!(std::fs::read(to.join("pages-1.img")).unwrap(), big);
        assert_eq!(std::fs::read(to.join("empty")).unwrap(), b"");
        std::fs::remove_dir_all(base).unwrap();
    }
}
