//! The differences from runc's shim that are meant, each with its reason. One that no longer occurs is an error too: the list is what
//! a user of runc's shim has to know, and nothing else.

use crate::bed::Containerd;
use crate::record::Difference;

/// A difference that is meant.
#[derive(Debug)]
pub struct Meant {
    /// The scenario; empty: any.
    pub scenario: &'static str,
    /// The observation's name; one `*` in it stands for anything.
    pub observation: &'static str,
    /// What our side's value contains (empty: anything).
    pub ours: &'static str,
    /// On which containerd; none: on both.
    pub only: Option<Containerd>,
    /// Whether it occurs in every run; what depends on the moment does not.
    pub always: bool,
    /// Why we are different.
    pub reason: &'static str,
}

/// An entry for both containerds that occurs in every run.
const fn meant(
    scenario: &'static str,
    observation: &'static str,
    ours: &'static str,
    reason: &'static str,
) -> Meant {
    Meant { scenario, observation, ours, only: None, always: true, reason }
}

impl Meant {
    /// It depends on the moment.
    const fn sometimes(self) -> Meant {
        Meant { always: false, ..self }
    }

    /// Only on this containerd.
    const fn on(self, only: Containerd) -> Meant {
        Meant { only: Some(only), ..self }
    }
}

/// The same failure, the same code; the words around the system's are Rust's and ours, not Go's.
const WORDS: &str = "the same refusal with the same code, in other words";
/// Of the runtime options that containerd passes on.
const GENERIC: &str = "we also take the options that CRI passes to runtimes that it does not know; containerd takes none but runc's for runc's type";
/// Faults of runc's shim that end it.
const DIES: &str = "runc's shim loses count, or ends, after a second start of the same exec; ours refuses it";
/// Of codes.
const FAULT: &str = "the code says that the request is wrong";
/// A shim's end.
const LAST_WORDS: &str = "runc's shim may end before its last answer or event is sent; ours waits for that";
/// Files.
const TEMPORARY: &str = "our temporary files lie in the bundle, which goes with the container, not in /tmp";
/// Streams.
const STREAMS: &str =
    "we also take a process with only some of its streams; runc's shim fails to open what has no name";

/// All of them.
pub const LIST: &[Meant] = &[
    meant(
        "",
        "*bundle/criu.conf",
        "file",
        "CRIU's config file: has to be there before `runc create`, so that a move can pass options that runc has no flags for",
    ),
    meant(
        "restore_bad",
        "shim: start t2",
        "is refused",
        "images are looked at before runc and CRIU get them",
    ),
    meant(
        "",
        "event of t1: checkpointed*",
        "checkpointed",
        "a checkpoint is told, as containerd's documentation asks; runc's shim does not",
    ),
    meant("", "event of *", "delete (", LAST_WORDS).sometimes(),
    meant(
        "double_create",
        "shim: create t1 again",
        "already exists",
        "refused before runc is run; containerd never asks for it",
    ),
    meant("create_bad_mount", "create t1", "failed to mount rootfs component", WORDS),
    meant("create_bad_options", "create t1", "InvalidArgument", FAULT).on(Containerd::V17),
    meant(
        "created_deleted",
        "shim: wait that was begun before",
        "exit=137",
        "who waits for a container that is deleted before its start hears of its end; runc's shim leaves them waiting",
    ),
    meant(
        "created_deleted",
        "event*",
        "",
        "the end of one that is deleted before its start comes behind its deletion, with its time; runc's shim tells of it without \
         a time (1.7), or ends before that (2.1)",
    ),
    meant("exec_bad_spec", "exec t1/x1*", "Unknown: ", WORDS),
    meant("exec_missing_program_again", "*", "", DIES),
    meant("exec_started_twice", "*", "", DIES).sometimes(),
    meant(
        "exec_unknown",
        "shim: close stdin of t1/x9",
        "NOT_FOUND",
        "the code says that there is none; containerd answers so by itself",
    ),
    meant("only_stdout", "*", "", STREAMS),
    meant("terminal_unread", "*", "", STREAMS),
    meant("fifo_missing", "create t1", "no such file", WORDS),
    meant("file_logger_cannot_be_made", "create t1", "failed to create init process I/O", WORDS),
    meant(
        "file_logger_of_two",
        "*.log",
        "",
        "a file that is named for stderr gets it; runc's shim writes both into stdout's",
    ),
    meant("binary_logger_missing", "create t1", "failed to create init process I/O", WORDS),
    meant("binary_logger_of_stderr_only", "create t1", "failed to create init process I/O", WORDS),
    meant("unknown_scheme", "create t1", "unknown stdio scheme", WORDS),
    meant("update_bad", "update t1*", "", WORDS),
    meant("update_bad", "shim: update t1*", "", WORDS),
    meant("binary_missing", "create t1", "OCI runtime create failed", WORDS),
    meant("shim_cgroup_missing", "create t1", "failed to start shim", WORDS),
    meant("what_runc_is_told", "runc create", "/NS/t1/pty-", TEMPORARY),
    meant("what_runc_is_told", "runc exec", "/NS/t1/.exec-", TEMPORARY),
    meant("generic_body", "*", "", GENERIC),
    meant("generic_path", "*", "", GENERIC),
    meant("generic_bad", "create t1", "cannot read the runtime options", GENERIC),
    meant("checkpoint_by_containerd", "checkpoint t1 (2)", "", IMAGE_PATH).on(Containerd::V17),
    meant("checkpoint_by_containerd", "*files", "", IMAGE_PATH).on(Containerd::V17),
    meant("checkpoint_bad", "shim: checkpoint t1*", "INVALID_ARGUMENT", FAULT),
    meant("shutdown_after_delete", "shim: shutdown", "ok", LAST_WORDS).sometimes(),
    meant("shutdown_after_delete", "event *", "", LAST_WORDS).sometimes(),
    meant(
        "delete_action",
        "its socket is left",
        "false",
        "the socket of a shim that was killed goes with the deletion",
    )
    .on(Containerd::V17),
    meant("unknown_method", "shim: no such method", "UNIMPLEMENTED", WORDS),
    meant("version_flag", "-v: *", "", "our name and version"),
    meant(
        "wrong_use",
        "an unknown flag: stderr",
        "flag provided but not defined",
        "our name before the words",
    ),
    meant("wrong_use", "delete in no bundle: *", "", "what has no bundle is deleted as far as runc knows it"),
    meant("info", "version", "0.", "our version").on(Containerd::V21),
    meant("info_with_options", "version*", "0.", "our version").on(Containerd::V21),
    meant("info_with_options", "-info of /no/such/runc: stderr", "/no/such/runc", WORDS).on(Containerd::V21),
    meant("start_action_without_bundle", "start: stderr", "config.json", WORDS),
];

/// containerd looks at ImagePath for runc's type only, up to 2.2.
const IMAGE_PATH: &str = "containerd passes ImagePath on for runc's type only: for a node where that matters, our program is set as its runtime_path";

impl Meant {
    fn applies(&self, containerd: Containerd) -> bool {
        self.only.is_none_or(|only| only == containerd)
    }

    fn covers(&self, scenario: &str, containerd: Containerd, difference: &Difference) -> bool {
        let name = &difference.name;
        let named = match self.observation.split_once('*') {
            Some((start, end)) => {
                name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
            }
            None => name == self.observation,
        };
        let ours = difference.ours.as_deref().unwrap_or_default();
        let theirs = difference.theirs.as_deref().unwrap_or_default();
        let code = |text: &str| text.split(':').next().map(str::to_owned);
        let fair = self.reason != WORDS || code(ours) == code(theirs);
        self.applies(containerd)
            && (self.scenario.is_empty() || self.scenario == scenario)
            && named
            && ours.contains(self.ours)
            && fair
    }
}

/// The differences of one scenario: what is meant (by its place in the list), and what is not.
pub fn judge(
    list: &[Meant],
    scenario: &str,
    containerd: Containerd,
    differences: Vec<Difference>,
) -> (Vec<(usize, Difference)>, Vec<Difference>) {
    let (mut meant, mut real) = (Vec::new(), Vec::new());
    for difference in differences {
        match list.iter().position(|m| m.covers(scenario, containerd, &difference)) {
            Some(place) => meant.push((place, difference)),
            None => real.push(difference),
        }
    }
    (meant, real)
}

/// The entries that should have occurred and did not: of the scenarios that ran, those of any scenario only if all ran.
pub fn outdated<'a>(
    list: &'a [Meant],
    containerd: Containerd,
    ran: &[&str],
    all_ran: bool,
    occurred: &[usize],
) -> Vec<&'a Meant> {
    let due = |m: &Meant| if m.scenario.is_empty() { all_ran } else { ran.contains(&m.scenario) };
    let entries = list.iter().enumerate();
    let missing =
        entries.filter(|(n, m)| m.always && m.applies(containerd) && due(m) && !occurred.contains(n));
    missing.map(|(_, m)| m).collect()
}

/// The runner's own test.
pub fn takes_only_what_is_listed() -> Result<(), String> {
    let entry = |scenario, observation, ours, only| Meant {
        scenario,
        observation,
        ours,
        only,
        always: true,
        reason: "a test",
    };
    let list =
        [entry("a", "x*", "our", None), entry("", "y", "", Some(Containerd::V17)), entry("b", "z", "", None)];
    let difference = |name: &str, ours: &str| Difference {
        name: name.into(),
        theirs: Some("theirs".into()),
        ours: Some(ours.into()),
    };
    let all = || vec![difference("x1", "ours"), difference("x2", "else"), difference("y", "")];
    let (meant, real) = judge(&list, "a", Containerd::V17, all());
    let names = |d: &[Difference]| d.iter().map(|d| d.name.clone()).collect::<Vec<_>>();
    if meant.iter().map(|(n, _)| *n).collect::<Vec<_>>() != [0, 1] || names(&real) != ["x2"] {
        return Err(format!("{meant:?} {real:?}"));
    }
    let (_, real) = judge(&list, "c", Containerd::V21, all());
    if real.len() != 3 {
        return Err(format!("taken for another scenario or containerd: {real:?}"));
    }
    let missing = outdated(&list, Containerd::V17, &["a", "b"], false, &[0]);
    if missing.len() != 1 || missing[0].scenario != "b" {
        return Err(format!("{missing:?}"));
    }
    Ok(())
}
