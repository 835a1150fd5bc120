//! containerd: its socket and version, the shim on the daemon's own PATH, the runtime handler in its configuration. Talking to
//! containerd about containers is [`crate::containerd`]'s matter.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use containerd_client::services::v1::version_client::VersionClient;

use super::{Finding, runtime::on_path, version_in};

/// The runtime's name in containerd, and the shim's file name that follows from it.
pub const RUNTIME: &str = "io.containerd.transship.v2";
/// See [`RUNTIME`].
pub const SHIM: &str = "containerd-shim-transship-v2";

/// What [`gather`] saw.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// The socket asked.
    pub socket: PathBuf,
    /// containerd's version, or why it did not answer.
    pub version: Option<Result<String, String>>,
    /// PATH in the daemon's environment.
    pub daemon_path: Option<String>,
    /// Where the daemon finds our shim.
    pub shim: Option<PathBuf>,
    /// `containerd config dump`, or why it could not be had.
    pub config: Option<Result<String, String>>,
}

/// Asks the daemon behind `socket`.
pub fn gather(socket: &Path) -> Facts {
    let mut facts = Facts { socket: socket.into(), ..Facts::default() };
    let pid = match UnixStream::connect(socket) {
        Ok(stream) => {
            nix::sys::socket::getsockopt(&stream.as_fd(), nix::sys::socket::sockopt::PeerCredentials)
                .ok()
                .map(|c| c.pid())
        }
        Err(e) => {
            facts.version = Some(Err(e.to_string()));
            return facts;
        }
    };
    facts.version = Some(ask_version(socket));
    if let Some(pid) = pid.filter(|p| *p > 0) {
        look_at(pid, &mut facts);
    }
    facts
}

/// The process behind the socket: environment, executable, configuration.
fn look_at(pid: i32, facts: &mut Facts) {
    let proc = PathBuf::from(format!("/proc/{pid}"));
    let strings = |file: &str| -> Vec<String> {
        let bytes = std::fs::read(proc.join(file)).unwrap_or_default();
        bytes.split(|b| *b == 0).map(|s| String::from_utf8_lossy(s).into_owned()).collect()
    };
    facts.daemon_path = strings("environ").iter().find_map(|v| v.strip_prefix("PATH=").map(str::to_string));
    let Ok(exe) = std::fs::read_link(proc.join("exe")) else { return };
    // As containerd resolves a runtime: PATH first, then beside its own executable.
    facts.shim = facts.daemon_path.as_deref().and_then(|p| on_path(SHIM, p)).or_else(|| {
        let beside = exe.parent()?.join(SHIM);
        beside.is_file().then_some(beside)
    });
    let mut dump = Command::new(&exe);
    if let Some(config) = config_argument(&strings("cmdline")) {
        dump.arg("--config").arg(config);
    }
    facts.config = Some(match dump.args(["config", "dump"]).output() {
        Ok(out) if out.status.success() => Ok(String::from_utf8_lossy(&out.stdout).into_owned()),
        Ok(out) => Err(String::from_utf8_lossy(&out.stderr).trim().to_string()),
        Err(e) => Err(format!("{}: {e}", exe.display())),
    });
}

/// The value of `--config` or `-c` on containerd's command line.
fn config_argument(cmdline: &[String]) -> Option<String> {
    cmdline.iter().enumerate().find_map(|(i, arg)| match arg.as_str() {
        "--config" | "-c" | "-config" => cmdline.get(i + 1).cloned(),
        other => other
            .strip_prefix("--config=")
            .or(other.strip_prefix("-c="))
            .or(other.strip_prefix("-config="))
            .map(str::to_string),
    })
}

fn ask_version(socket: &Path) -> Result<String, String> {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| e.to_string())?;
    let ask = async {
        let channel = containerd_client::connect(socket).await.map_err(|e| e.to_string())?;
        let answer = VersionClient::new(channel).version(()).await.map_err(|e| e.message().to_string())?;
        Ok(answer.into_inner().version)
    };
    runtime
        .block_on(async { tokio::time::timeout(Duration::from_secs(5), ask).await })
        .unwrap_or_else(|_| Err("no answer within 5 s".into()))
}

/// What matters of containerd's configuration for CRI.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Cri {
    /// Names of the handlers whose runtime is ours.
    handlers: Vec<String>,
    /// `restrict_oom_score_adj`.
    restrict_oom: bool,
    /// The CRI plugin is disabled.
    disabled: bool,
    /// The section that handlers stand in, for the advice.
    section: &'static str,
}

/// Reads a dumped configuration of version 2 (containerd 1.7) or 3 (2.x).
fn parse_config(text: &str) -> Result<Cri, String> {
    let config: toml::Table = text.parse().map_err(|e: toml::de::Error| e.message().to_string())?;
    let version = config.get("version").and_then(toml::Value::as_integer).unwrap_or(1);
    let (plugin, section) = match version {
        3.. => ("io.containerd.cri.v1.runtime", "io.containerd.cri.v1.runtime"),
        _ => ("io.containerd.grpc.v1.cri", "io.containerd.grpc.v1.cri"),
    };
    let disabled = config.get("disabled_plugins").and_then(toml::Value::as_array).is_some_and(|list| {
        list.iter().filter_map(toml::Value::as_str).any(|p| p == plugin || p == "io.containerd.grpc.v1.cri")
    });
    let cri = config.get("plugins").and_then(|p| p.get(plugin));
    let ours = |handler: &toml::Value| {
        let text = |key: &str| handler.get(key).and_then(toml::Value::as_str).unwrap_or_default();
        text("runtime_type") == RUNTIME || text("runtime_path").ends_with(SHIM)
    };
    let handlers = cri
        .and_then(|c| c.get("containerd"))
        .and_then(|c| c.get("runtimes"))
        .and_then(toml::Value::as_table)
        .map(|t| t.iter().filter(|(_, h)| ours(h)).map(|(name, _)| name.clone()).collect())
        .unwrap_or_default();
    let restrict_oom =
        cri.and_then(|c| c.get("restrict_oom_score_adj")).and_then(toml::Value::as_bool).unwrap_or_default();
    Ok(Cri { handlers, restrict_oom, disabled, section })
}

/// The rules. `lacks_resource`: this machine's processes lack CAP_SYS_RESOURCE.
pub fn verdict(facts: &Facts, lacks_resource: bool) -> Vec<Finding> {
    let mut out = Vec::new();
    match &facts.version {
        Some(Ok(version)) => {
            let found = format!("{version} ({})", facts.socket.display());
            out.push(match version_in(version) {
                Some(v) if v < (1, 6, 0) => Finding::fail("containerd", found, "1.7 or newer is needed"),
                Some(v) if v < (1, 7, 0) => {
                    Finding::warn("containerd", found, "the tests run on 1.7 and 2.1; 1.6 is not tested")
                }
                _ => Finding::ok("containerd", found),
            });
        }
        Some(Err(e)) => {
            out.push(Finding::fail(
                "containerd",
                format!("{}: {e}", facts.socket.display()),
                "start containerd, or name its socket by `containerd` in /etc/transship/agent.toml",
            ));
            return out;
        }
        None => {}
    }
    out.push(match (&facts.shim, &facts.daemon_path) {
        (Some(path), _) => Finding::ok("shim", path.display().to_string()),
        (None, Some(path)) => Finding::fail(
            "shim",
            format!("{SHIM} is not on containerd's PATH ({path})"),
            format!("install {SHIM} into one of these directories, for instance /usr/local/bin"),
        ),
        (None, None) => Finding::warn(
            "shim",
            "containerd's environment cannot be read",
            format!("run as root in containerd's own pid namespace to see whether it finds {SHIM}"),
        ),
    });
    match facts.config.as_ref().map(|c| c.as_ref().map_err(Clone::clone).and_then(|t| parse_config(t))) {
        Some(Ok(cri)) => out.extend(judge_cri(&cri, lacks_resource)),
        Some(Err(e)) => out.push(Finding::warn(
            "runtime handler",
            format!("containerd's configuration cannot be read: {e}"),
            "`containerd config dump` must work to see whether Kubernetes can use transship; ctr does not need it",
        )),
        None => {}
    }
    out
}

fn judge_cri(cri: &Cri, lacks_resource: bool) -> Vec<Finding> {
    if cri.disabled {
        return vec![Finding::ok("runtime handler", "CRI is disabled; ctr needs no handler")];
    }
    if cri.handlers.is_empty() {
        return vec![Finding::warn(
            "runtime handler",
            "none for transship",
            format!(
                "ctr works (--runtime {RUNTIME}); for Kubernetes add a handler to [plugins.'{}'.containerd.runtimes] \
                 (examples/) and restart containerd",
                cri.section
            ),
        )];
    }
    let mut out = vec![Finding::ok("runtime handler", cri.handlers.join(" "))];
    if lacks_resource && !cri.restrict_oom {
        out.push(Finding::warn(
            "oom scores",
            "restrict_oom_score_adj is false and CAP_SYS_RESOURCE is missing",
            format!(
                "CRI pods fail to start: set restrict_oom_score_adj = true in [plugins.'{}']",
                cri.section
            ),
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    const V2: &str = r#"
version = 2
[plugins."io.containerd.grpc.v1.cri"]
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.transship]
runtime_type = "io.containerd.transship.v2"
"#;
    const V3: &str = r#"
version = 3
disabled_plugins = []
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.moving]
runtime_type = "io.containerd.runc.v2"
runtime_path = "/usr/local/bin/containerd-shim-transship-v2"
"#;

    fn good() -> Facts {
        Facts {
            socket: "/run/containerd/containerd.sock".into(),
            version: Some(Ok("v2.1.9".into())),
            daemon_path: Some("/usr/bin".into()),
            shim: Some("/usr/bin/containerd-shim-transship-v2".into()),
            config: Some(Ok(V3.into())),
        }
    }

    fn level(facts: &Facts, check: &str) -> Level {
        verdict(facts, false).into_iter().find(|f| f.check == check).unwrap().level
    }

    #[test]
    fn both_configuration_versions_are_read() {
        let v2 = parse_config(V2).unwrap();
        assert_eq!((v2.handlers, v2.restrict_oom), (vec!["transship".to_string()], true));
        let v3 = parse_config(V3).unwrap();
        assert_eq!((v3.handlers, v3.restrict_oom), (vec!["moving".to_string()], false));
        assert!(parse_config("version = [").is_err());
        assert!(parse_config("disabled_plugins = ['io.containerd.grpc.v1.cri']").unwrap().disabled);
    }

    #[test]
    fn our_examples_register_the_handler() {
        for text in [
            include_str!("../../examples/containerd-1.7.toml"),
            include_str!("../../examples/containerd-2.x.toml"),
        ] {
            assert_eq!(parse_config(text).unwrap().handlers, ["transship"]);
        }
    }

    #[test]
    fn each_lack_is_found() {
        assert!(verdict(&good(), false).iter().all(|f| f.level == Level::Ok));
        let silent = Facts { version: Some(Err("refused".into())), ..good() };
        assert_eq!(verdict(&silent, false).len(), 1, "nothing else can be known");
        assert_eq!(level(&silent, "containerd"), Level::Fail);
        assert_eq!(level(&Facts { version: Some(Ok("1.6.20".into())), ..good() }, "containerd"), Level::Warn);
        assert_eq!(level(&Facts { shim: None, ..good() }, "shim"), Level::Fail);
        assert_eq!(
            level(&Facts { config: Some(Ok("version = 3".into())), ..good() }, "runtime handler"),
            Level::Warn
        );
    }

    #[test]
    fn oom_scores_matter_only_without_the_capability() {
        let has = |lacks| verdict(&good(), lacks).iter().any(|f| f.check == "oom scores");
        assert!(has(true) && !has(false));
        let restricted = Facts { config: Some(Ok(V2.into())), ..good() };
        assert!(!verdict(&restricted, true).iter().any(|f| f.check == "oom scores"));
    }

    #[test]
    fn the_daemons_configuration_is_found_on_its_command_line() {
        let line = |text: &str| text.split(' ').map(str::to_string).collect::<Vec<_>>();
        assert_eq!(config_argument(&line("containerd -c /x.toml")).as_deref(), Some("/x.toml"));
        assert_eq!(
            config_argument(&line("containerd --config=/y.toml -l debug")).as_deref(),
            Some("/y.toml")
        );
        assert_eq!(config_argument(&line("containerd")), None);
    }
}
