//! Standard streams: a counter out, whatever comes in back out.

use std::io::{BufRead, Write};

use transship_testtools::args::Args;

use crate::say;

pub fn run(args: &Args) -> Result<(), String> {
    std::thread::spawn(|| {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            say::line(&format!("in {line}"));
        }
        say::line("in-closed");
    });
    let every = say::every(args)?;
    for n in 1u64.. {
        if transship_testtools::signals::stops() > 0 {
            break;
        }
        say::line(&format!("out {n}"));
        if args.flag("stderr") {
            let _ = std::io::stderr().write_all(format!("err {n}\n").as_bytes());
        }
        transship_testtools::signals::pause(every);
    }
    Ok(())
}
