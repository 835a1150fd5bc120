//! Encrypted checkpoint files: the age format (age-encryption.org/v1), by the `age` crate. `age --decrypt` reads what is written here.
//!
//! Everything of a checkpoint is inside, its manifest too. It is encrypted on its way into the file, in pieces of 64 KiB with a
//! MAC each, and decrypted on its way out of it: nothing of it is ever on a disk as it is, nor in memory as a whole. A piece that was
//! changed, moved or left out, and an end that is missing, are noticed when they are read.
//!
//! It says nothing of who wrote the file: whoever knows a recipient can encrypt to it. So what comes out is believed no more than what
//! comes out of a file that is not encrypted.
//!
//! Passphrases and identities come in files, by descriptor: none is on a command line or in a message. ssh keys are not read: that
//! would need the crate `rsa`, for whose RUSTSEC-2023-0071 there is no remedy.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use age::secrecy::{ExposeSecret, SecretString};
use age::stream::{StreamReader, StreamWriter};
use age::{DecryptError, Decryptor, Encryptor, Identity, IdentityFile, Recipient, scrypt, x25519};
use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::wire::Transport;

/// How an encrypted file begins.
const MAGIC: &[u8] = b"age-encryption.org/";
/// How a file begins that age has encrypted and written as text.
const ARMOR: &[u8] = b"-----BEGIN AGE ENCRYPTED FILE-----";

/// The work of a guess at a passphrase: scrypt with 2^18 blocks, 256 MiB and about a second. As `age` does.
const WORK: u8 = 18;
/// The most that a file may ask of us: 1 GiB. It comes from outside.
const MOST_WORK: u8 = 20;
/// The most that a file of keys may hold, in bytes.
const KEYS: u64 = 1 << 20;

/// To whom a checkpoint file is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SealTo {
    /// To whoever has the identity of one of these public keys, `age1...`.
    Recipients(Vec<String>),
    /// To whoever knows the passphrase, which comes by descriptor.
    Passphrase,
}

/// The key that was given is not the file's: nothing is wrong with the file.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct WrongKey(String);

fn wrong(text: impl Into<String>) -> anyhow::Error {
    WrongKey(text.into()).into()
}

fn recipient(text: &str) -> Result<x25519::Recipient> {
    // without the text: somebody may have taken the wrong one of two files
    text.parse().map_err(|_| {
        anyhow!(match text {
            secret if secret.starts_with("AGE-SECRET-KEY-") =>
                "that is a secret key: give its public key, which begins with age1 (age-keygen -y FILE prints it)",
            ssh if ssh.starts_with("ssh-") =>
                "ssh keys are not supported: make a key with age-keygen, and give its public key, which begins with age1",
            _ => "not a public key of age's: it begins with age1, and age-keygen makes it",
        })
    })
}

/// The public keys in a text, one a line; empty lines and comments (`#`) are skipped.
///
/// # Errors
/// Another line, or none at all.
pub fn recipients(text: &str) -> Result<Vec<String>> {
    let lines = text.lines().map(str::trim).enumerate();
    let keys: Vec<String> = lines
        .filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
        .map(|(n, line)| recipient(line).with_context(|| format!("line {}", n + 1)).map(|_| line.to_owned()))
        .collect::<Result<_>>()?;
    ensure!(!keys.is_empty(), "there is no public key in it");
    Ok(keys)
}

/// Opens a file with keys or a passphrase: a regular one, so that nobody waits for a FIFO.
pub fn open_keys(path: &Path) -> Result<File> {
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = open.with_context(|| path.display().to_string())?;
    ensure!(file.metadata()?.is_file(), "{} is not a regular file", path.display());
    Ok(file)
}

fn read_keys(mut file: &File) -> Result<Zeroizing<Vec<u8>>> {
    let size = file.metadata()?.len();
    ensure!(size <= KEYS, "{size} bytes are no file of keys");
    // room for all of it at once: what is copied to make more room would stay in memory
    let mut bytes = Zeroizing::new(Vec::with_capacity(size as usize + 1));
    file.seek(SeekFrom::Start(0))?;
    file.take(KEYS).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn passphrase(file: &File) -> Result<SecretString> {
    let bytes = read_keys(file).context("reading the passphrase")?;
    let text = std::str::from_utf8(&bytes).map_err(|_| anyhow!("the passphrase is not UTF-8"))?;
    let first = text.lines().next().unwrap_or_default();
    ensure!(!first.is_empty(), "the passphrase (the first line of its file) is empty");
    Ok(SecretString::from(first.to_owned()))
}

/// An empty file as the place where a checkpoint goes, encrypted; `secret` holds the passphrase, if it is that.
pub fn seal(file: File, to: &SealTo, secret: Option<&File>) -> Result<Box<dyn Transport>> {
    let passphrase = secret.map(passphrase).transpose()?;
    seal_with(file, to, passphrase, WORK)
}

fn seal_with(file: File, to: &SealTo, secret: Option<SecretString>, work: u8) -> Result<Box<dyn Transport>> {
    let all: Vec<Box<dyn Recipient>> = match to {
        SealTo::Recipients(keys) => {
            keys.iter().map(|k| Ok(Box::new(recipient(k)?) as _)).collect::<Result<_>>()?
        }
        SealTo::Passphrase => {
            let mut one = scrypt::Recipient::new(secret.context("the passphrase did not come along")?);
            one.set_work_factor(work);
            vec![Box::new(one)]
        }
    };
    let encryptor = Encryptor::with_recipients(all.iter().map(|r| &**r)).context("the recipients")?;
    let writer = encryptor.wrap_output(file).context("writing the checkpoint file")?;
    Ok(Box::new(Sealed(Some(writer))))
}

/// What is written is encrypted; complete, with its last piece's MAC, once it is finished.
struct Sealed(Option<StreamWriter<File>>);

impl Sealed {
    fn open(&mut self) -> io::Result<&mut StreamWriter<File>> {
        self.0.as_mut().ok_or_else(|| io::Error::other("the checkpoint file is complete"))
    }
}

impl Read for Sealed {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

impl Write for Sealed {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.open()?.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.open()?.flush()
    }
}

impl Transport for Sealed {
    fn finish(&mut self) -> io::Result<()> {
        match self.0.take() {
            Some(writer) => writer.finish()?.sync_all(),
            None => Ok(()),
        }
    }
}

/// Whether a file is encrypted; it then stands at its start.
///
/// # Errors
/// It cannot be read, or age has written it as text.
pub fn is_sealed(file: &mut File) -> Result<bool> {
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    (&*file).take(ARMOR.len() as u64).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(0))?;
    if head == ARMOR {
        bail!(
            "the file is encrypted and written as text: make it binary (age --decrypt, then age --encrypt without --armor)"
        );
    }
    Ok(head.starts_with(MAGIC))
}

/// What is in an encrypted file, as it is read; `keys` holds identities or the passphrase, whichever the file asks for.
///
/// # Errors
/// [`WrongKey`] if it is not the file's; anything else is the file's own fault.
pub fn unseal(file: File, keys: Option<&File>) -> Result<Box<dyn Transport>> {
    let decryptor = Decryptor::new_buffered(BufReader::new(file)).map_err(not_whole)?;
    let phrase = decryptor.is_scrypt();
    let Some(keys) = keys else {
        return Err(wrong(match phrase {
            true => {
                "the file is encrypted with a passphrase: give the file that holds it, with --passphrase-file"
            }
            false => "the file is encrypted: give the file with the identity, with --identity",
        }));
    };
    let identities = match phrase {
        true => {
            // a file with identities begins otherwise; asked for the wrong thing, scrypt would take its second first
            let secret = passphrase(keys).map_err(|e| wrong(format!("{e:#}")))?;
            let given = secret.expose_secret();
            if given.starts_with("AGE-SECRET-KEY-") || given.starts_with("# created:") {
                return Err(wrong(
                    "the file is encrypted with a passphrase, not to an identity: give --passphrase-file",
                ));
            }
            let mut one = scrypt::Identity::new(secret);
            one.set_max_work_factor(MOST_WORK);
            vec![Box::new(one) as Box<dyn Identity + Send + Sync>]
        }
        false => identities(keys)?,
    };
    let reader = decryptor.decrypt(identities.iter().map(|i| &**i as &dyn Identity)).map_err(|e| match e {
        DecryptError::NoMatchingKeys => {
            wrong("the file is not encrypted to any of the identities that were given")
        }
        DecryptError::DecryptionFailed | DecryptError::KeyDecryptionFailed if phrase => {
            wrong("the passphrase is not the file's")
        }
        DecryptError::ExcessiveWork { required, .. } => {
            anyhow!("the file asks for 2^{required} steps for its passphrase, more than is done for a file (2^{MOST_WORK})")
        }
        e => not_whole(e),
    })?;
    Ok(Box::new(Unsealed(reader)))
}

fn identities(keys: &File) -> Result<Vec<Box<dyn Identity + Send + Sync>>> {
    let bytes = read_keys(keys).context("reading the identities")?;
    let found =
        IdentityFile::from_buffer(&bytes[..]).and_then(|f| f.into_identities().map_err(io::Error::other));
    let found = found.map_err(|_| {
        // without what is in it
        wrong("the file that was given with --identity is not one of age's: age-keygen makes one, and its secret key begins with AGE-SECRET-KEY-1")
    })?;
    if found.is_empty() {
        return Err(wrong("there is no identity in the file that was given with --identity"));
    }
    Ok(found)
}

/// The header is damaged.
fn not_whole(e: DecryptError) -> anyhow::Error {
    anyhow!("the checkpoint file is damaged or truncated (in the encryption's header: {e})")
}

struct Unsealed(StreamReader<BufReader<File>>);

impl Read for Unsealed {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}

impl Write for Unsealed {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Transport for Unsealed {
    fn finish(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    fn key() -> (x25519::Identity, SealTo, File) {
        let identity = x25519::Identity::generate();
        let to = SealTo::Recipients(vec![identity.to_public().to_string()]);
        let text = format!("# created: now\n{}\n", identity.to_string().expose_secret());
        (identity, to, file(text.as_bytes()))
    }

    fn sealed(content: &[u8], to: &SealTo, secret: Option<&str>) -> Vec<u8> {
        let mut target = tempfile::tempfile().unwrap();
        let secret = secret.map(|s| SecretString::from(s.to_owned()));
        let mut writer = seal_with(target.try_clone().unwrap(), to, secret, 4).unwrap();
        writer.write_all(content).unwrap();
        writer.finish().unwrap();
        assert!(writer.write_all(b"x").is_err(), "it was complete");
        let mut bytes = Vec::new();
        target.seek(SeekFrom::Start(0)).unwrap();
        target.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn opened(bytes: &[u8], keys: Option<&File>) -> Result<Vec<u8>> {
        let mut f = file(bytes);
        assert!(is_sealed(&mut f).unwrap());
        let mut out = Vec::new();
        unseal(f, keys)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn what_goes_in_comes_out_and_is_not_seen_in_between() {
        let content: Vec<u8> = (0..300_000u32).flat_map(|n| n.to_le_bytes()).collect();
        let (_, to, keys) = key();
        let bytes = sealed(&content, &to, None);
        assert!(!bytes.windows(64).any(|w| content[4096..].starts_with(w)));
        assert_eq!(opened(&bytes, Some(&keys)).unwrap(), content);
        // the descriptor may have been read before: by the agent, for one
        assert_eq!(opened(&bytes, Some(&keys)).unwrap(), content);
        let phrase = sealed(&content, &SealTo::Passphrase, Some("correct horse"));
        assert_eq!(opened(&phrase, Some(&file(b"correct horse\nmore\n"))).unwrap(), content);
    }

    #[test]
    fn a_key_that_is_not_the_files_is_told_from_a_damaged_file() {
        let (_, to, keys) = key();
        let (_, _, others) = key();
        let bytes = sealed(b"content", &to, None);
        let phrase = sealed(b"content", &SealTo::Passphrase, Some("horse"));
        for (bytes, keys, words) in [
            (&bytes, None, "--identity"),
            (&bytes, Some(&others), "not encrypted to any"),
            (&bytes, Some(&file(b"SECRETWORD\n")), "not one of age's"),
            (&bytes, Some(&file(b"# nothing\n")), "no identity"),
            (&phrase, None, "--passphrase-file"),
            (&phrase, Some(&keys), "not to an identity"),
            (&phrase, Some(&file(b"mule\n")), "not the file's"),
            (&phrase, Some(&file(b"\nhorse\n")), "empty"),
        ] {
            let error = opened(bytes, keys).unwrap_err();
            assert!(error.is::<WrongKey>() && format!("{error:#}").contains(words), "{words}: {error:#}");
            assert!(!format!("{error:#} {error:?}").contains("SECRETWORD"));
        }
        assert!(!opened(&bytes[..60], Some(&keys)).unwrap_err().is::<WrongKey>());
    }

    #[test]
    fn every_truncation_and_every_changed_byte_is_noticed() {
        let (_, to, keys) = key();
        // exactly two pieces: the end of the first one is where a cut would be the hardest to see
        let bytes = sealed(&vec![7; 128 << 10], &to, None);
        let ends = bytes.len() - (64 << 10) - 16;
        for cut in (0..bytes.len())
            .step_by(997)
            .chain([ends - 1, ends, ends + 1, bytes.len() - 1])
            .filter(|c| *c > 40)
        {
            assert!(opened(&bytes[..cut], Some(&keys)).is_err(), "cut at {cut}");
        }
        for at in (30..400).chain((400..bytes.len()).step_by(997)).chain([bytes.len() - 1]) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert!(opened(&bad, Some(&keys)).is_err(), "byte {at}");
        }
        assert!(opened(&[&bytes[..], b"x"].concat(), Some(&keys)).is_err());
    }

    #[test]
    fn a_file_cannot_ask_for_any_amount_of_work() {
        let bytes = sealed(b"content", &SealTo::Passphrase, Some("horse"));
        let text = String::from_utf8_lossy(&bytes[..100]).into_owned();
        let line = text.lines().find(|l| l.starts_with("-> scrypt")).unwrap();
        let dear = [line.strip_suffix(" 4").unwrap(), " 30"].concat();
        let at = text.find(line).unwrap();
        let bad = [&bytes[..at], dear.as_bytes(), &bytes[at + line.len()..]].concat();
        let error = opened(&bad, Some(&file(b"horse"))).unwrap_err();
        assert!(error.to_string().contains("2^30"), "{error:#}");
    }

    #[test]
    fn public_keys_are_read_and_nothing_else_is_repeated() {
        let (identity, _, _) = key();
        let public = identity.to_public().to_string();
        assert_eq!(recipients(&format!("# mine\n\n {public} \n")).unwrap(), [public]);
        let secret = identity.to_string();
        for (text, word) in [
            (secret.expose_secret(), "secret key"),
            ("ssh-ed25519 AAAA me", "ssh keys"),
            ("age1nonsense", "begins with age1"),
            ("# nothing", "no public key"),
        ] {
            let error = format!("{:#}", recipients(text).unwrap_err());
            assert!(error.contains(word) && !error.contains(secret.expose_secret()), "{error}");
        }
    }

    #[test]
    fn text_is_refused_with_advice() {
        let error = is_sealed(&mut file(b"-----BEGIN AGE ENCRYPTED FILE-----\nYWdl\n")).unwrap_err();
        assert!(error.to_string().contains("--armor"));
        assert!(!is_sealed(&mut file(b"TRSHPCK1")).unwrap() && !is_sealed(&mut file(b"")).unwrap());
    }
}
