//! What the operator chooses of a live migration. Data only: [`Asked`] is what one of them said (command line, configuration),
//! [`Tuning`] what holds. What follows from it is decided in [`crate::memory`] and by the two sides of the migration.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A choice among words: their names, reading and showing them; serde uses the same names.
macro_rules! words {
    ($type:ident, $what:literal, $($variant:ident = $name:literal),+) => {
        impl $type {
            /// Every name, in the order of the help.
            pub const NAMES: &'static [&'static str] = &[$($name),+];
        }
        impl FromStr for $type {
            type Err = String;
            fn from_str(text: &str) -> Result<Self, String> {
                match text {
                    $($name => Ok($type::$variant),)+
                    _ => Err(format!(concat!("{:?} is no ", $what, "; write {}"), text, $type::NAMES.join(", "))),
                }
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $($type::$variant => $name),+ })
            }
        }
    };
}

/// When memory is copied: before the container stands still, or after it runs on the other node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// Rounds before the freeze; what the downtime does not allow follows after it.
    #[default]
    Auto,
    /// Everything before the container runs on the other node, however long it stands still for that: nothing of it is left
    /// behind at the commit.
    PreCopy,
    /// Nothing before the freeze; the container runs on the other node at once, and its memory follows.
    PostCopy,
}
words!(Mode, "mode", Auto = "auto", PreCopy = "pre-copy", PostCopy = "post-copy");

/// How memory is packed for the way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// As it is.
    None,
    /// Fast.
    Lz4,
    /// Tight.
    Zstd,
    /// What is fastest in all, by measuring the link against the CPU.
    #[default]
    Auto,
}
words!(Compression, "compression", None = "none", Lz4 = "lz4", Zstd = "zstd", Auto = "auto");

/// What becomes of the container when the source, or the link to it, is lost while memory still follows (post-copy).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnPostCopyFailure {
    /// It is killed on the destination, and the frozen rest on the source too: nothing goes on with wrong memory or in two
    /// places.
    #[default]
    Kill,
    /// It is killed on the destination and runs on at the source from the moment of its freeze. What it did on the destination
    /// is undone for itself, but not for those who saw it: only for workloads where that is right.
    Thaw,
}
words!(OnPostCopyFailure, "such choice", Kill = "kill", Thaw = "thaw");

/// What holds for one migration. Every field has a default, so that an older command line, agent or peer works.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tuning {
    /// When memory is copied.
    pub mode: Mode,
    /// How long the container may stand still for its memory, in milliseconds. An aim, not a promise.
    pub max_downtime_ms: u64,
    /// The most bytes that are sent in a second; `None`: as many as the link takes.
    pub bandwidth: Option<u64>,
    /// How memory is packed.
    pub compress: Compression,
    /// What a loss in post-copy leads to.
    pub on_post_copy_failure: OnPostCopyFailure,
    /// The most rounds before the freeze.
    pub max_rounds: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Tuning {
            mode: Mode::Auto,
            max_downtime_ms: 300,
            bandwidth: None,
            compress: Compression::Auto,
            on_post_copy_failure: OnPostCopyFailure::Kill,
            max_rounds: 30,
        }
    }
}

/// What one of those who may choose has said; `None`: nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Asked {
    /// See [`Tuning::mode`].
    pub mode: Option<Mode>,
    /// See [`Tuning::max_downtime_ms`].
    pub max_downtime_ms: Option<u64>,
    /// See [`Tuning::bandwidth`]; 0 asks for no limit.
    pub bandwidth: Option<u64>,
    /// See [`Tuning::compress`].
    pub compress: Option<Compression>,
    /// See [`Tuning::on_post_copy_failure`].
    pub on_post_copy_failure: Option<OnPostCopyFailure>,
    /// See [`Tuning::max_rounds`].
    pub max_rounds: Option<u32>,
}

impl Asked {
    /// What was asked for, and `otherwise` where nothing was.
    pub fn over(&self, otherwise: &Tuning) -> Tuning {
        Tuning {
            mode: self.mode.unwrap_or(otherwise.mode),
            max_downtime_ms: self.max_downtime_ms.unwrap_or(otherwise.max_downtime_ms),
            bandwidth: self.bandwidth.map_or(otherwise.bandwidth, |rate| (rate > 0).then_some(rate)),
            compress: self.compress.unwrap_or(otherwise.compress),
            on_post_copy_failure: self.on_post_copy_failure.unwrap_or(otherwise.on_post_copy_failure),
            max_rounds: self.max_rounds.unwrap_or(otherwise.max_rounds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_says_nothing_is_the_default() {
        assert_eq!(serde_json::from_str::<Tuning>("{}").unwrap(), Tuning::default());
        assert_eq!(Asked::default().over(&Tuning::default()), Tuning::default());
        let future = r#"{"mode":"post-copy","colour":"blue"}"#;
        assert_eq!(serde_json::from_str::<Tuning>(future).unwrap().mode, Mode::PostCopy);
    }

    #[test]
    fn the_nearer_one_wins_field_by_field() {
        let node = Tuning { bandwidth: Some(1000), max_downtime_ms: 50, ..Tuning::default() };
        let asked = Asked { mode: Some(Mode::PreCopy), max_downtime_ms: Some(0), ..Asked::default() };
        let tuning = asked.over(&node);
        assert_eq!((tuning.mode, tuning.max_downtime_ms, tuning.bandwidth), (Mode::PreCopy, 0, Some(1000)));
        // a limit of the node's can be lifted
        assert_eq!(Asked { bandwidth: Some(0), ..Asked::default() }.over(&node).bandwidth, None);
    }

    #[test]
    fn words_are_read_shown_and_stored_alike() {
        fn check<T>(names: &[&str])
        where
            T: FromStr<Err = String>
                + fmt::Display
                + Serialize
                + serde::de::DeserializeOwned
                + PartialEq
                + fmt::Debug,
        {
            for name in names {
                let word: T = name.parse().unwrap();
                assert_eq!(word.to_string(), *name);
                assert_eq!(serde_json::to_value(&word).unwrap(), *name);
                assert_eq!(serde_json::from_value::<T>((*name).into()).unwrap(), word);
            }
            let error = "sideways".parse::<T>().unwrap_err();
            assert!(names.iter().all(|n| error.contains(n)), "{error}");
        }
        check::<Mode>(Mode::NAMES);
        check::<Compression>(Compression::NAMES);
        check::<OnPostCopyFailure>(OnPostCopyFailure::NAMES);
    }
}
