//! What the fuzz targets have in common. Built for tests and for `cargo fuzz` only; `fuzz/README.md` says how they are run.
//!
//! A target's body takes any bytes and panics when something is wrong: what comes from outside may be refused, but it may not end the
//! process, hang it or cost it memory without bound; what was understood and is written again has to say the same. The bodies live in
//! `fuzz.rs` of the room whose bytes they are, so that they see what only the room sees. The fuzzers in `fuzz/fuzz_targets` call them,
//! and so do the tests here, with each target's seeds and with the corpus that is kept in `fuzz/corpus`.

use std::path::PathBuf;

use tempfile::TempDir;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// Its name: that of its fuzzer and of its corpus.
    pub name: &'static str,
    /// Its body.
    pub run: fn(&[u8]),
    /// Inputs that make sense, made by our own encoders.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident = $room:ident $(:: $inner:ident)*;)+) => {
        /// Every target of the library. The shim has one of its own.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            run: crate::$room$(::$inner)*::fuzz::$name::run,
            seeds: crate::$room$(::$inner)*::fuzz::$name::seeds,
        }),+];

        #[cfg(test)]
        mod replayed {
            $(
                #[test]
                fn $name() {
                    let at = |t: &&super::Target| t.name == stringify!($name);
                    super::replay(super::TARGETS.iter().find(at).expect("it is in the table"));
                }
            )+
        }
    };
}

targets! {
    migrate_frames = migrate;
    migrate_stream = migrate;
    migrate_checkpoint = migrate;
    agent_messages = agent;
    agent_config = agent;
    control_messages = control;
    layer_entry = rootfs;
    layer_apply = rootfs;
    criu_images = criu;
    criu_page_server = criu;
    criu_requests = criu;
    criu_tar = criu::tar;
    memory_batch = memory;
    lazy_pages = memory::daemon;
    net_config = net;
    proc_text = memory;
    tls_hello = tls;
}

/// Where a target's corpus is kept.
pub fn corpus(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

/// Runs a target's body on its seeds and on its corpus.
///
/// # Panics
/// When the body does, with the name of the input; when there is no corpus.
pub fn replay(target: &Target) {
    let on = |what: &str, bytes: &[u8]| {
        let run = std::panic::AssertUnwindSafe(|| (target.run)(bytes));
        if let Err(panic) = std::panic::catch_unwind(run) {
            eprintln!("the target {} fails on {what}", target.name);
            std::panic::resume_unwind(panic);
        }
    };
    on("no bytes at all", &[]);
    for (n, seed) in (target.seeds)().iter().enumerate() {
        on(&format!("its seed {n}"), seed);
    }
    let dir = corpus(target.name);
    let files = std::fs::read_dir(&dir).unwrap_or_else(|e| panic!("the corpus {}: {e}", dir.display()));
    let mut count = 0;
    for file in files {
        let path = file.expect("a file of the corpus").path();
        on(&path.display().to_string(), &std::fs::read(&path).expect("a file of the corpus"));
        count += 1;
    }
    assert!(count > 0, "nothing in {}", dir.display());
}

/// A directory on a tmpfs, if there is one: a target makes thousands a second.
pub fn dir() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory")
}

/// A directory in which hostile input may work, and things beside it that must stay as they are.
pub struct Cage {
    top: TempDir,
}

/// What lies beside the cage's root.
const BESIDE: &[u8] = b"beside the root";

impl Cage {
    /// Makes both.
    pub fn new() -> Cage {
        let top = dir();
        std::fs::create_dir(top.path().join("root")).expect("a root");
        std::fs::write(top.path().join("beside"), BESIDE).expect("a file beside it");
        Cage { top }
    }

    /// Where the input may work.
    pub fn root(&self) -> PathBuf {
        self.top.path().join("root")
    }

    /// Something of the caller's own beside the root.
    pub fn make(&self, name: &str) -> PathBuf {
        let path = self.top.path().join(name);
        std::fs::create_dir(&path).expect("a directory beside the root");
        path
    }

    /// # Panics
    /// When something outside of the root has changed; `made` are the names that the caller knows of.
    pub fn check(&self, made: &[&str]) {
        use std::os::unix::fs::MetadataExt;
        let names =
            std::fs::read_dir(self.top.path()).expect("the cage").map(|e| e.expect("a name").file_name());
        let odd: Vec<_> =
            names.filter(|n| n != "root" && n != "beside" && !made.iter().any(|m| n == m)).collect();
        assert!(odd.is_empty(), "made outside of the root: {odd:?}");
        let beside = self.top.path().join("beside");
        let meta = beside.symlink_metadata().expect("what lies beside the root");
        assert!(
            meta.is_file() && meta.nlink() == 1,
            "what lies beside the root was replaced, or has a second name"
        );
        assert_eq!(std::fs::read(beside).expect("what lies beside the root"), BESIDE);
    }
}

impl Default for Cage {
    fn default() -> Self {
        Cage::new()
    }
}

/// A target's bytes, read as numbers and pieces. At the end there are only zeros.
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All of them.
    pub fn new(bytes: &'a [u8]) -> Input<'a> {
        Input(bytes)
    }

    /// Nothing is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte.
    pub fn byte(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    /// Eight bytes, little-endian.
    pub fn number(&mut self) -> u64 {
        self.take(8).iter().rev().fold(0, |n, b| n << 8 | u64::from(*b))
    }

    /// So many bytes, or what is left.
    pub fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    /// A piece behind its length in 16 bits.
    pub fn chunk(&mut self) -> &'a [u8] {
        let len = self.take(2).iter().rev().fold(0, |n, b| n << 8 | usize::from(*b));
        self.take(len)
    }

    /// All the rest.
    pub fn rest(&mut self) -> &'a [u8] {
        self.take(usize::MAX)
    }
}

/// A piece as [`Input::chunk`] reads it.
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    let len = u16::try_from(bytes.len()).expect("a seed's piece is short");
    [&len.to_le_bytes()[..], bytes].concat()
}

/// What holds of every JSON message: read, written and read again it is the same.
///
/// # Panics
/// When it is not.
pub fn json<M: serde::Serialize + serde::de::DeserializeOwned>(bytes: &[u8]) {
    let Ok(message) = serde_json::from_slice::<M>(bytes) else { return };
    let once = serde_json::to_value(&message).expect("it was read from JSON");
    let again = serde_json::to_vec(&message).expect("it was read from JSON");
    let again: M = serde_json::from_slice(&again).expect("what was written is read again");
    let again = serde_json::to_value(&again).expect("it was read from JSON");
    assert!(same(&once, &again), "{once} becomes {again}");
}

/// Equal, but for the last digits of fractions, which serde_json reads quickly rather than exactly.
fn same(a: &serde_json::Value, b: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (a, b) {
        (Value::Number(a), Value::Number(b)) if a.is_f64() && b.is_f64() => {
            let (a, b) = (a.as_f64().unwrap_or(0.0), b.as_f64().unwrap_or(0.0));
            (a - b).abs() <= a.abs() * 1e-12
        }
        (Value::Array(a), Value::Array(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len()
                && a.iter().all(|(key, value)| b.get(key).is_some_and(|other| same(value, other)))
        }
        _ => a == b,
    }
}

/// Writes a target's seeds into a folder of its name.
#[cfg(test)]
fn write(target: &Target, to: &std::path::Path) {
    let dir = to.join(target.name);
    std::fs::create_dir_all(&dir).expect("a folder of seeds");
    for (n, seed) in (target.seeds)().iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{n:02}")), seed).expect("a seed");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_a_fuzzer_and_every_corpus_a_target() {
        let here = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
        let names = |dir: &str| -> Vec<String> {
            let all = std::fs::read_dir(here.join(dir)).unwrap().map(|e| e.unwrap().path());
            let mut all: Vec<_> =
                all.map(|p| p.file_stem().unwrap().to_string_lossy().into_owned()).collect();
            all.sort();
            all
        };
        let mut targets: Vec<_> = TARGETS.iter().map(|t| t.name.to_string()).collect();
        targets.sort();
        assert_eq!(names("fuzz/fuzz_targets"), targets);
        let manifest = std::fs::read_to_string(here.join("fuzz/Cargo.toml")).unwrap();
        for name in &targets {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
        }
        // with the shim's, which lies beside the shim
        targets.extend(names("shim/fuzz/fuzz_targets"));
        targets.sort();
        assert_eq!(names("fuzz/corpus"), targets);
    }

    #[test]
    fn a_body_that_panics_fails_the_replay() {
        let broken = Target { run: |bytes| assert!(bytes.len() < 3), ..TARGETS[0] };
        assert!(std::panic::catch_unwind(|| replay(&broken)).is_err());
    }

    /// Not a test: puts every target's seeds into the folder that the variable names. `hack/fuzz` calls it.
    #[test]
    #[ignore = "a tool of hack/fuzz"]
    fn write_seeds() {
        let Some(to) = std::env::var_os("TRANSSHIP_SEEDS").map(PathBuf::from) else { return };
        for target in TARGETS {
            write(target, &to);
        }
    }
}
