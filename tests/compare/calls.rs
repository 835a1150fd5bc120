//! The calls of the Task API that scenarios make, and what is answered, written the same way for both ways to a shim:
//! through containerd (`daemon.rs`) and directly (`shim.rs`).

use crate::normal::Normal;

/// One call. A process is named by its exec id, the container's first by an empty one.
#[derive(Clone, Debug)]
pub enum Call {
    /// State of a process.
    State(&'static str),
    /// Starts a process.
    Start(&'static str),
    /// Deletes a process.
    Delete(&'static str),
    /// A signal to one process.
    Kill(&'static str, u32),
    /// A signal to all processes.
    KillAll(u32),
    /// Describes a further process.
    Exec(Box<NewExec>),
    /// A terminal's width and height.
    Resize(&'static str, u32, u32),
    /// No more input.
    CloseIo(&'static str),
    /// Freezes the container.
    Pause,
    /// Thaws it.
    Resume,
    /// Dumps it.
    Checkpoint(Box<Checkpoint>),
    /// New limits, as JSON.
    Update(String),
    /// Waits for a process's end.
    Wait(&'static str),
    /// The cgroup's figures.
    Stats,
    /// The processes.
    Pids,
    /// The shim's and the container's pid; only of a shim.
    Connect,
    /// Asks the shim to end, at once or not; only of a shim.
    Shutdown(bool),
}

/// A process to be added.
#[derive(Clone, Debug, Default)]
pub struct NewExec {
    /// Its exec id.
    pub id: &'static str,
    /// An OCI process, as JSON.
    pub spec: String,
    /// Its streams.
    pub stdio: Stdio,
}

/// Standard streams as a request names them.
#[derive(Clone, Debug, Default)]
pub struct Stdio {
    /// A FIFO, or nothing.
    pub stdin: String,
    /// A FIFO or a URI, or nothing.
    pub stdout: String,
    /// As `stdout`.
    pub stderr: String,
    /// Whether there is a terminal.
    pub terminal: bool,
}

/// How to dump.
#[derive(Clone, Debug, Default)]
pub struct Checkpoint {
    /// Folder of the images; through containerd an option.
    pub path: String,
    /// Folder of CRIU's log.
    pub work: String,
    /// Whether the container ends.
    pub exit: bool,
    /// Options of this type instead (with no content).
    pub odd_options: Option<&'static str>,
}

impl Call {
    /// Its name with its arguments, as observations have it.
    pub fn name(&self, id: &str) -> String {
        let of = |exec: &str| if exec.is_empty() { id.to_owned() } else { format!("{id}/{exec}") };
        match self {
            Call::State(exec) => format!("state of {}", of(exec)),
            Call::Start(exec) => format!("start {}", of(exec)),
            Call::Delete(exec) => format!("delete {}", of(exec)),
            Call::Kill(exec, signal) => format!("kill {} {signal}", of(exec)),
            Call::KillAll(signal) => format!("kill all of {id} {signal}"),
            Call::Exec(new) => format!("exec {}", of(new.id)),
            Call::Resize(exec, ..) => format!("resize {}", of(exec)),
            Call::CloseIo(exec) => format!("close stdin of {}", of(exec)),
            Call::Pause => format!("pause {id}"),
            Call::Resume => format!("resume {id}"),
            Call::Checkpoint(c) => format!("checkpoint {id}{}", if c.exit { " and end it" } else { "" }),
            Call::Update(_) => format!("update {id}"),
            Call::Wait(exec) => format!("wait for {}", of(exec)),
            Call::Stats => format!("stats of {id}"),
            Call::Pids => format!("processes of {id}"),
            Call::Connect => format!("connect to {id}"),
            Call::Shutdown(now) => format!("shutdown{}", if *now { " now" } else { "" }),
        }
    }
}

/// One field of an answer.
#[derive(Clone, Debug)]
pub enum Field {
    /// A process.
    Pid(&'static str, u32),
    /// A list of processes, each with the exec id that the shim says it has.
    Pids(Vec<(u32, String)>),
    /// Words in which numbers mean something.
    Exact(&'static str, String),
    /// Anything else.
    Word(&'static str, String),
}

/// What a call answers.
pub type Answer = Vec<Field>;

/// A refusal.
#[derive(Clone, Debug)]
pub struct Failure {
    /// gRPC's or ttrpc's status code.
    pub code: String,
    /// The words.
    pub message: String,
}

impl Failure {
    /// No status: the connection, or no answer in time.
    pub fn broken(message: impl std::fmt::Display) -> Failure {
        Failure { code: "no answer".into(), message: message.to_string() }
    }
}

/// How a call ended.
pub type Outcome = Result<Answer, Failure>;

/// A time: whether there is one. Go's zero time is the year 1, protobuf's 1970.
pub fn time(seconds: Option<i64>) -> String {
    match seconds {
        None => "no time".into(),
        Some(..=0) => "never".into(),
        Some(_) => "a time".into(),
    }
}

/// An outcome as an observation.
pub fn shown(outcome: &Outcome, normal: &Normal) -> String {
    let answer = match outcome {
        Ok(answer) => answer,
        Err(e) => return format!("{}: {}", e.code, normal.text(&e.message)),
    };
    let field = |field: &Field| match field {
        Field::Pid(name, pid) => format!("{name}={}", normal.pid(*pid)),
        Field::Exact(name, text) => format!("{name}={text}"),
        Field::Word(name, text) => format!("{name}={}", normal.text(text)),
        Field::Pids(pids) => {
            let one = |(pid, exec): &(u32, String)| {
                let said = if exec.is_empty() { String::new() } else { format!("={exec}") };
                format!("{}{said}", normal.pid(*pid))
            };
            let mut list: Vec<String> = pids.iter().map(one).collect();
            list.sort();
            list.join(" ")
        }
    };
    if answer.is_empty() { "ok".into() } else { answer.iter().map(field).collect::<Vec<_>>().join(" ") }
}
