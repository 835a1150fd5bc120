//! A redis client that can tell whether anything was lost: ONE TCP connection, never reconnected, one request at a time,
//! INCR and GET by turns, every reply checked. Prints one JSON object at the end.
//!
//! Here: options and the order of things. `connection.rs` speaks redis' protocol, `load.rs` is the INCR/GET loop and what it
//! found, `data.rs` fills the server and checks the data afterwards, `journal.rs` is the file of events for scripts.

mod connection;
mod data;
mod journal;
mod load;

use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;
use transship_testtools::{args::Args, signals, time};

const HELP: &str =
    "ts-client HOST:PORT [options]: INCR and GET on one connection, every reply checked; ends on TERM
  --rate N          requests a second (default 500)
  --seconds S       stop after S seconds (default: run until TERM)
  --fill-mb N       first load N MB of pseudo-random data, and check it at the end, on the same connection
  --value-bytes N   size of one value of that data (default 16384)
  --progress FILE   append events (connected, filled, running, tick, gap, end) as JSON lines
  --gap-ms N        list gaps between replies longer than this (default 10)
  --timeout S       give the connection up after S seconds without a reply (default 60)
  --key NAME        the counter's key (default counter)
Ends with 0 when the connection survived and nothing was lost or wrong, else with 1.";

fn run() -> Result<bool, String> {
    let mut args = Args::new(std::env::args().skip(1), &["help"]);
    if args.flag("help") {
        println!("{HELP}");
        return Ok(true);
    }
    let address = args.position("HOST:PORT")?;
    let fill = args.option_number("fill-mb", 0)? << 20;
    let value = args.option_number("value-bytes", 16384)?.max(1) as usize;
    let options = load::Options {
        key: args.option("key").unwrap_or("counter").to_owned(),
        interval: Duration::from_secs(1) / args.option_number("rate", 500)?.clamp(1, 1_000_000) as u32,
        seconds: args
            .option("seconds")
            .map(|s| s.parse::<f64>().map_err(|e| format!("--seconds {s}: {e}")))
            .transpose()?,
        gap: Duration::from_millis(args.option_number("gap-ms", 10)?),
    };
    let timeout = Duration::from_secs(args.option_number("timeout", 60)?);
    let mut journal = journal::Journal::open(args.option("progress"))?;
    signals::install();

    let mut connection =
        connection::Connection::open(&address, timeout).map_err(|e| format!("{address}: {e}"))?;
    journal.event(json!({"event": "connected", "local": connection.local()}));
    let values = fill.div_ceil(value as u64);
    if values > 0 {
        data::fill(&mut connection, values, value).map_err(|e| format!("loading the data: {e}"))?;
        journal.event(json!({"event": "filled", "values": values, "bytes": values * value as u64}));
    }
    let start = time::realtime();
    let mut found = load::run(&mut connection, &options, &mut journal);
    let mut data_wrong = None;
    if values > 0 && found.error.is_none() {
        match data::wrong(&mut connection, values, value) {
            Ok(wrong) => data_wrong = Some(wrong),
            Err(e) => found.error = Some(format!("checking the data: {e}")),
        }
    }
    let survived = found.error.is_none();
    let report = json!({
        "connection_survived": survived, "error": found.error, "local": connection.local(),
        "replies": found.replies, "lost": found.lost, "wrong": found.wrong + data_wrong.unwrap_or(0),
        "counter": found.counter, "data_values": values, "data_wrong": data_wrong,
        "longest_gap_ms": time::ms(found.longest), "gaps": found.gaps, "start": start, "seconds": time::realtime() - start,
        "latency": {"before": found.before, "after": found.after.json()},
    });
    journal.event(json!({"event": "end"}));
    println!("{report}");
    Ok(survived && found.lost == 0 && found.wrong == 0 && data_wrong.unwrap_or(0) == 0)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("ts-client: {e}");
            ExitCode::from(2)
        }
    }
}
