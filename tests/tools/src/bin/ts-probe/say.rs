//! How workloads report: one line a round, until TERM.

use std::io::Write;
use std::time::Duration;

use transship_testtools::{args::Args, signals};

/// One line on stdout at once. A reader that went away does not end the workload.
pub fn line(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(format!("{text}\n").as_bytes()).and_then(|()| out.flush());
}

/// The pace of rounds.
pub fn every(args: &Args) -> Result<Duration, String> {
    Ok(Duration::from_millis(args.option_number("every", 200)?.max(1)))
}

/// Calls `round` at the asked pace until TERM and prints what it says after `NAME round=N`.
pub fn rounds(
    name: &str,
    args: &Args,
    mut round: impl FnMut(u64) -> Result<String, String>,
) -> Result<(), String> {
    let every = every(args)?;
    for n in 1.. {
        if signals::stops() > 0 {
            break;
        }
        let text = round(n)?;
        line(format!("{name} round={n} {text}").trim_end());
        signals::pause(every);
    }
    Ok(())
}
