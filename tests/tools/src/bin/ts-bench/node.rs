//! `ts-bench node`: runs inside a node and does what it is told, one JSON object a line on stdin, one answer a line on stdout.
//! It is there so that no measured step pays for entering the node's namespaces. Ends with its stdin, and takes with it
//! what it had started.
//!
//! Requests: `run` (a command, to its end), `spawn` (a command, in the background), `wait` (for one of those), `write` (a file),
//! `await_file` (until it has a byte), `receive` and `received`, `send` (see `copy.rs`). Every answer has `begin` and `end`, by the wall
//! clock, or `error`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, Read, Seek, Write};
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use transship_testtools::time;

use crate::copy;

/// Room for a command's output in an answer.
const OUTPUT: usize = 64 << 10;

#[derive(Default)]
struct Helper {
    children: BTreeMap<u64, (Child, PathBuf)>,
    receiver: Option<JoinHandle<std::io::Result<u64>>>,
    next: u64,
}

fn text(value: &Value, name: &str) -> Result<String, String> {
    value[name].as_str().map(str::to_owned).ok_or_else(|| format!("{name} is missing in {value}"))
}

fn command(value: &Value) -> Result<Command, String> {
    let words: Vec<&str> = value.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (program, args) = words.split_first().ok_or("an empty command")?;
    let mut command = Command::new(program);
    // a group of its own, so that it can be ended with all it started
    command.args(args).stdin(Stdio::null()).process_group(0);
    Ok(command)
}

/// The end of a file.
fn tail(path: &Path) -> String {
    let read = || {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(std::io::SeekFrom::Start(length.saturating_sub(OUTPUT as u64)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        std::io::Result::Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

fn end_group(child: &mut Child) {
    // SAFETY: signals the group of a child that has not been waited for; its number cannot be another's.
    unsafe { libc::kill(-(child.id() as i32), libc::SIGKILL) };
    let _ = child.wait();
}

/// Waits for it; after `limit` it is ended and that is an error. Output goes to files: with a pipe, what the command leaves
/// running would keep us waiting.
fn wait(child: &mut Child, limit: Duration) -> Result<i64, String> {
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            return Ok(status.code().map_or(-1, i64::from));
        }
        if start.elapsed() > limit {
            end_group(child);
            return Err(format!("not done after {limit:?}"));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(2));
    }
}

impl Helper {
    fn spawn(&mut self, words: &Value) -> Result<u64, String> {
        self.next += 1;
        let log = PathBuf::from(format!("/run/ts-bench.{}.{}", std::process::id(), self.next));
        let out = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        let err = out.try_clone().map_err(|e| e.to_string())?;
        let child = command(words)?.stdout(out).stderr(err).spawn().map_err(|e| format!("{words}: {e}"))?;
        self.children.insert(self.next, (child, log));
        Ok(self.next)
    }

    fn finish(&mut self, id: u64, limit: Duration) -> Result<Value, String> {
        let (mut child, log) = self.children.remove(&id).ok_or("no such child")?;
        let code = wait(&mut child, limit);
        let output = tail(&log);
        let _ = std::fs::remove_file(&log);
        match code {
            Ok(code) => Ok(json!({"code": code, "output": output})),
            Err(e) => Err(format!("{e}: {output}")),
        }
    }

    fn answer(&mut self, request: &Value) -> Result<Value, String> {
        let limit = Duration::from_secs(request["limit_s"].as_u64().unwrap_or(120));
        match text(request, "do")?.as_str() {
            "run" => {
                let id = self.spawn(&request["command"])?;
                self.finish(id, limit)
            }
            "spawn" => Ok(json!({"id": self.spawn(&request["command"])?})),
            "wait" => self.finish(request["id"].as_u64().unwrap_or(0), limit),
            "write" => {
                let path = PathBuf::from(text(request, "path")?);
                let write = || {
                    std::fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
                    std::fs::write(&path, text(request, "content").unwrap_or_default())
                };
                write().map_err(|e| format!("{}: {e}", path.display()))?;
                Ok(json!({}))
            }
            "await_file" => {
                let (path, start) = (text(request, "path")?, Instant::now());
                while std::fs::metadata(&path).map_or(0, |m| m.len()) == 0 {
                    if start.elapsed() > limit {
                        return Err(format!("{path} is still empty after {limit:?}"));
                    }
                    std::thread::sleep(Duration::from_micros(500));
                }
                Ok(json!({}))
            }
            "receive" => {
                let (dir, address) = (PathBuf::from(text(request, "dir")?), text(request, "address")?);
                let listener = TcpListener::bind(&address).map_err(|e| format!("{address}: {e}"))?;
                self.receiver = Some(std::thread::spawn(move || copy::receive(&listener, &dir)));
                Ok(json!({}))
            }
            "received" => {
                let receiver = self.receiver.take().ok_or("nothing is being received")?;
                let bytes = receiver.join().map_err(|_| "the receiver failed")?.map_err(|e| e.to_string())?;
                Ok(json!({"bytes": bytes}))
            }
            "send" => {
                let bytes = copy::send(Path::new(&text(request, "dir")?), &text(request, "to")?)
                    .map_err(|e| format!("sending: {e}"))?;
                Ok(json!({"bytes": bytes}))
            }
            other => Err(format!("unknown request {other:?}")),
        }
    }
}

/// Until stdin ends.
pub fn run() -> Result<(), String> {
    let mut helper = Helper::default();
    for line in std::io::stdin().lock().lines() {
        let line = line.map_err(|e| e.to_string())?;
        let begin = time::realtime();
        let request: Value = serde_json::from_str(&line).map_err(|e| format!("{line}: {e}"))?;
        let mut answer = helper.answer(&request).unwrap_or_else(|e| json!({"error": e}));
        answer["begin"] = json!(begin);
        answer["end"] = json!(time::realtime());
        let mut out = std::io::stdout().lock();
        out.write_all(format!("{answer}\n").as_bytes())
            .and_then(|()| out.flush())
            .map_err(|e| e.to_string())?;
    }
    for (mut child, log) in std::mem::take(&mut helper.children).into_values() {
        end_group(&mut child);
        let _ = std::fs::remove_file(log);
    }
    Ok(())
}
