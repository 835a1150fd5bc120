//! `file://` and `binary://`: output without a client.

use std::os::unix::fs::PermissionsExt;

use anyhow::Result;

use crate::calls::{Call, Stdio};
use crate::left;
use crate::making::New;
use crate::spec::{self, Spec};
use crate::subject::Subject;

list![
    file_logger,
    file_logger_of_two,
    file_logger_is_appended_to,
    file_logger_cannot_be_made,
    binary_logger,
    binary_logger_of_an_exec,
    binary_logger_of_a_terminal,
    binary_logger_missing,
    binary_logger_crashes,
    binary_logger_of_stderr_only,
    unknown_scheme,
];

/// Prints to both streams, and ends.
const SAYS: &str = "echo out; echo err >&2; exit 3";

fn file_logger(s: &mut Subject) -> Result<()> {
    // the folder is made
    let log = s.log("new/folder/t1.log");
    s.run(New::of(Spec::sh(SAYS)).stdio(log))?;
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::State(""));
    let _ = s.call(Call::Delete(""));
    let mut lines: Vec<String> = s.scratched("new/folder/t1.log").lines().map(str::to_owned).collect();
    lines.sort();
    s.note("the file's lines", lines.join(" "));
    for (name, kind) in left::entries(&s.host(&s.scratch("new/folder"))) {
        s.note(format!("folder/{name}"), kind);
    }
    for (name, kind) in left::entries(&s.host(&s.scratch("new"))) {
        s.note(format!("new/{name}"), kind);
    }
    Ok(())
}

/// For stderr another file is named.
fn file_logger_of_two(s: &mut Subject) -> Result<()> {
    let stdio = Stdio { stderr: s.log("err.log").stderr, ..s.log("out.log") };
    s.create(New::of(Spec::sh(SAYS)).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    for file in ["out.log", "err.log"] {
        let mut lines: Vec<String> = s.scratched(file).lines().map(str::to_owned).collect();
        lines.sort();
        s.note(file, lines.join(" "));
    }
    Ok(())
}

fn file_logger_is_appended_to(s: &mut Subject) -> Result<()> {
    std::fs::write(s.host(&s.scratch("t1.log")), "before\n")?;
    let log = s.log("t1.log");
    s.run(New::of(Spec::sh("echo during; sleep 1000")).stdio(log.clone()))?;
    s.until("it has written", |s| s.scratched("t1.log").contains("during"));
    let _ = s.exec("x1", spec::script("echo in an exec"), log);
    let _ = s.call(Call::Wait("x1"));
    let _ = s.call(Call::Delete("x1"));
    s.end();
    let text = s.scratched("t1.log").trim_end().replace('\n', "|");
    s.note("the file", text);
    Ok(())
}

fn file_logger_cannot_be_made(s: &mut Subject) -> Result<()> {
    let uri = "file:///proc/no/such/folder.log".to_owned();
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Default::default() };
    s.create(New::of(Spec::idle()).stdio(stdio.clone()))?;
    s.run(New::of(Spec::idle()).id("t2"))?;
    Ok(())
}

/// A logging program: writes what it was told, and what it reads, into the scratch folder. Its arguments are pairs in any order; what
/// it has inherited beside its own descriptors is whatever containerd had.
const LOGGER: &str = r#"#!/bin/sh
all=
for word in "$@"; do [ "$last" != dir ] || dir=$word; last=$word; done
while [ $# -gt 0 ]; do all="$all$1=$2
"; shift 2; done
printf %s "$all" | sort > $dir/told
echo "id: $CONTAINER_ID" >> $dir/told
env | grep -v -e ^PWD= -e ^SHLVL= -e ^_= -e ^OLDPWD= | cut -d= -f1 | sort >> $dir/told
ls /proc/$$/fd | grep -x '[0-5]' | tr '\n' ' ' >> $dir/told
exec 5>&-
cat <&3 > $dir/out & cat <&4 > $dir/err &
wait
"#;

fn logger(s: &Subject, name: &str, text: &str) -> Result<Stdio> {
    let path = s.host(&s.scratch(name));
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    let uri = format!("binary://{}?dir={}&flag&word=two+words", s.scratch(name), s.scratch(""));
    Ok(Stdio { stdout: uri.clone(), stderr: uri, ..Default::default() })
}

fn note_logged(s: &mut Subject) {
    for file in ["told", "out", "err"] {
        let text = s.scratched(file);
        s.note(format!("the logger's {file}"), text.trim_end().replace(['\n', '\r'], "|"));
    }
}

fn binary_logger(s: &mut Subject) -> Result<()> {
    let stdio = logger(s, "logger", LOGGER)?;
    s.create(New::of(Spec::sh(SAYS)).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Wait(""));
    s.until("the logger has everything", |s| s.scratched("err").contains("err"));
    let _ = s.call(Call::Delete(""));
    note_logged(s);
    Ok(())
}

fn binary_logger_of_an_exec(s: &mut Subject) -> Result<()> {
    s.run(New::of(Spec::idle()))?;
    let stdio = logger(s, "logger", LOGGER)?;
    let _ = s.exec("x1", spec::script(SAYS), stdio);
    let _ = s.call(Call::Wait("x1"));
    s.until("the logger has everything", |s| s.scratched("err").contains("err"));
    let _ = s.call(Call::Delete("x1"));
    note_logged(s);
    s.end();
    Ok(())
}

fn binary_logger_of_a_terminal(s: &mut Subject) -> Result<()> {
    let stdio = Stdio { terminal: true, stderr: String::new(), ..logger(s, "logger", LOGGER)? };
    s.create(New::of(Spec::sh("tty; echo out; exit 3").terminal()).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Wait(""));
    s.until("the logger has everything", |s| s.scratched("out").contains("out"));
    let _ = s.call(Call::Delete(""));
    note_logged(s);
    Ok(())
}

fn binary_logger_missing(s: &mut Subject) -> Result<()> {
    let uri = "binary:///no/such/logger?a=b".to_owned();
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Default::default() };
    s.create(New::of(Spec::idle()).stdio(stdio.clone()))?;
    s.run(New::of(Spec::idle()).id("t2"))?;
    Ok(())
}

/// It ends without a word: for `binary` that counts as ready.
fn binary_logger_crashes(s: &mut Subject) -> Result<()> {
    let stdio = logger(s, "logger", "#!/bin/sh\nexit 1\n")?;
    s.create(New::of(Spec::sh("sleep 0.2; echo out || exit 4; exit 3")).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    let _ = s.call(Call::Wait(""));
    let _ = s.call(Call::Delete(""));
    Ok(())
}

fn binary_logger_of_stderr_only(s: &mut Subject) -> Result<()> {
    let stdio = Stdio { stdout: String::new(), ..logger(s, "logger", LOGGER)? };
    s.create(New::of(Spec::sh(SAYS)).stdio(stdio))?;
    let _ = s.call(Call::Start(""));
    Ok(())
}

fn unknown_scheme(s: &mut Subject) -> Result<()> {
    let uri = "gopher:///x".to_owned();
    let stdio = Stdio { stdout: uri.clone(), stderr: uri, ..Default::default() };
    s.create(New::of(Spec::idle()).stdio(stdio))?;
    Ok(())
}
