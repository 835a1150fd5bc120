//! The options of `transship migrate` that say how memory moves. What is not said is left to the agent's configuration.

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};

use crate::migrate::quantity;
use crate::migrate::tuning::{Asked, Compression, Mode, OnPostCopyFailure};

/// The parser of a choice among words, which the help then lists.
macro_rules! word {
    ($type:ident) => {
        PossibleValuesParser::new($type::NAMES).try_map(|s| s.parse::<$type>())
    };
}

/// See the module.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "How memory moves (what is not said: the agent's [migration], else as shown)")]
pub struct Options {
    /// Before the container stands still (pre-copy), after it runs there (post-copy), or as its writing allows [auto]
    ///
    /// auto: memory is copied in rounds while the container runs, and what does not fit into --max-downtime follows once it
    /// runs on the other node. pre-copy: nothing is left behind when it runs there, however long it has to stand still for
    /// that. post-copy: it runs there at once and all of its memory follows; until then the loss of either node, or of the
    /// link, costs the container.
    #[arg(long, value_name = "MODE", value_parser = word!(Mode))]
    pub mode: Option<Mode>,
    /// How long it may stand still for its memory, e.g. 100ms, 1.5s [300ms]
    ///
    /// An aim, not a promise: what CRIU, runc and the network need comes on top.
    #[arg(long, value_name = "DURATION", value_parser = quantity::duration_ms)]
    pub max_downtime: Option<u64>,
    /// The most that is sent, e.g. 100MB/s, 1Gbit/s [unlimited]
    #[arg(long, value_name = "RATE", value_parser = bandwidth)]
    pub bandwidth: Option<u64>,
    /// How memory is packed; auto measures the link against the CPU [auto]
    #[arg(long, value_name = "HOW", value_parser = word!(Compression))]
    pub compress: Option<Compression>,
    /// If source or link are lost while memory still follows: kill it, or thaw it on the source [kill]
    ///
    /// kill: the container is lost. thaw: it is killed on the destination and runs on at the source from the moment of its
    /// freeze; whoever talked to it since then has seen what never happened. Only where that is right.
    #[arg(long, value_name = "WHAT", value_parser = word!(OnPostCopyFailure))]
    pub on_post_copy_failure: Option<OnPostCopyFailure>,
}

fn bandwidth(text: &str) -> Result<u64, String> {
    quantity::rate(text).map(|rate| rate.unwrap_or(0))
}

impl Options {
    /// As the agent is asked.
    pub fn asked(&self) -> Asked {
        Asked {
            mode: self.mode,
            max_downtime_ms: self.max_downtime,
            bandwidth: self.bandwidth,
            compress: self.compress,
            on_post_copy_failure: self.on_post_copy_failure,
            max_rounds: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};

    fn asked(options: &str) -> Asked {
        let line = format!("transship migrate redis --to b {options}");
        match Cli::try_parse_from(line.split_whitespace()).unwrap().verb {
            Verb::Migrate(migrate) => migrate.tuning.asked(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_said_is_not_asked_for() {
        assert_eq!(asked(""), Asked::default());
    }

    #[test]
    fn what_is_said_arrives_in_units_of_the_api() {
        let all = asked(
            "--mode post-copy --max-downtime 1.5s --bandwidth 1Gbit/s --compress lz4 --on-post-copy-failure thaw",
        );
        let want = Asked {
            mode: Some(Mode::PostCopy),
            max_downtime_ms: Some(1500),
            bandwidth: Some(125_000_000),
            compress: Some(Compression::Lz4),
            on_post_copy_failure: Some(OnPostCopyFailure::Thaw),
            max_rounds: None,
        };
        assert_eq!(all, want);
        assert_eq!(asked("--bandwidth unlimited").bandwidth, Some(0));
    }
}
