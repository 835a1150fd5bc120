//! A file of events, one JSON object a line, for scripts that want to know what the client saw and when.

use std::fs::{File, OpenOptions};
use std::io::Write;

use serde_json::{Value, json};
use transship_testtools::time;

pub struct Journal(Option<File>);

impl Journal {
    /// Appends to `path`; without one, events go nowhere.
    pub fn open(path: Option<&str>) -> Result<Self, String> {
        let open =
            |p: &str| OpenOptions::new().create(true).append(true).open(p).map_err(|e| format!("{p}: {e}"));
        Ok(Self(path.map(open).transpose()?))
    }

    /// Writes one event with the time of the wall clock.
    pub fn event(&mut self, mut event: Value) {
        if let Some(file) = &mut self.0 {
            event["realtime"] = json!(time::realtime());
            // a full disk must not end the measurement
            let _ = file.write_all(format!("{event}\n").as_bytes());
        }
    }
}
