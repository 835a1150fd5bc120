//! Workloads for measurements: they run inside a container, say what they saw of a move (longest stall, pace, latency), and
//! check every byte of their memory on demand. Static, so that it runs in any image.
//!
//! Here: options. `drive.rs` paces the work, `meter.rs` measures, `control.rs` takes commands over TCP, `pages.rs` is memory that
//! can be checked, `writer.rs` and `tree.rs` are the workloads.

mod control;
mod drive;
mod meter;
mod pages;
mod tree;
mod writer;

use std::process::ExitCode;

use transship_testtools::{args::Args, signals};

const HELP: &str = "ts-load WORKLOAD [options]
  writer    one process, memory written page by page
      --mb N              size (default 64)
      --rate R            bytes a second, as 100MB/s or 1GiB/s; max: as fast as it goes (default 100MB/s)
      --pattern P         random or sequential: which page is next (default random)
      --shared            in shared memory
  tree      many processes; the first asks one after the other to write a page, through pipes
      --procs N           processes (default 50)
      --mb N              memory of each (default 1)
      --steps N           questions a second (default 1000)
  --port N                commands are taken here (default 7000; 0: none)
  --seconds S             end after S seconds (default: run until TERM)
ts-load ask HOST:PORT COMMAND   sends a command, prints the answer (JSON, one line):
  status    longest stall since `reset`, pace, latencies
  reset     measure anew from here on
  verify    check all memory; \"wrong\" is 0 if every page is what was last written
  stop      end";

/// Bytes a second; nothing for `max`.
fn rate(text: &str) -> Result<Option<f64>, String> {
    if text == "max" {
        return Ok(None);
    }
    let number = text.trim_end_matches("/s");
    let digits = number.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &number[digits.len()..] {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("--rate {text:?}: unknown unit {other:?}")),
    };
    let value: f64 = digits.parse().map_err(|e| format!("--rate {text:?}: {e}"))?;
    Ok(Some(value * unit).filter(|r| r.is_finite() && *r >= 0.0))
}

fn run() -> Result<(), String> {
    let mut args = Args::new(std::env::args().skip(1), &["help", "shared"]);
    if args.flag("help") {
        println!("{HELP}");
        return Ok(());
    }
    let workload = args.position("WORKLOAD")?;
    if workload == "ask" {
        let (address, command) = (args.position("HOST:PORT")?, args.position("COMMAND")?);
        println!("{}", control::ask(&address, &command)?);
        return Ok(());
    }
    let port = u16::try_from(args.option_number("port", 7000)?).map_err(|e| format!("--port: {e}"))?;
    let seconds =
        args.option("seconds").map(|s| s.parse::<f64>().map_err(|e| format!("--seconds {s:?}: {e}")));
    let seconds = seconds.transpose()?;
    signals::install();
    match workload.as_str() {
        "writer" => {
            let mb = args.option_number("mb", 64)?;
            let random = match args.option("pattern").unwrap_or("random") {
                "random" => true,
                "sequential" => false,
                other => return Err(format!("--pattern {other:?}: random or sequential")),
            };
            let shared = args.flag("shared");
            let steps =
                rate(args.option("rate").unwrap_or("100MB/s"))?.map(|bytes| bytes / pages::PAGE as f64);
            drive::run(writer::Writer::new((mb << 20) as usize, random, shared)?, steps, port, seconds)
        }
        "tree" => {
            let (procs, mb) = (args.option_number("procs", 50)?.max(2), args.option_number("mb", 1)?);
            let tree = tree::Tree::new(procs as usize - 1, (mb << 20) as usize)?;
            drive::run(tree, Some(args.option_number("steps", 1000)? as f64), port, seconds)
        }
        other => Err(format!("no workload {other:?}\n{HELP}")),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("ts-load: {e}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn rates() {
        use super::rate;
        assert_eq!(rate("100MB/s"), Ok(Some(1e8)));
        assert_eq!(rate("1.5GiB/s"), Ok(Some(1.5 * 1073741824.0)));
        assert_eq!(rate("4096"), Ok(Some(4096.0)));
        assert_eq!(rate("max"), Ok(None));
        assert!(rate("10XB/s").is_err() && rate("MB/s").is_err());
    }
}
