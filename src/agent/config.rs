//! The agent's configuration: `/etc/transship/agent.toml`. Every key has a default; unknown keys are errors.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Deserializer, de::Error as _};

use crate::{
    containerd::client::DEFAULT_SOCKET as CONTAINERD_SOCKET,
    control::{Limits, RUN_DIR},
    migrate::{
        quantity,
        tuning::{Asked, Compression, Mode, OnPostCopyFailure, Tuning},
    },
    policy::Policy,
    tls::config::{DEFAULT_DIR as PKI_DIR, Pki},
};

/// Where the configuration is looked for.
pub const DEFAULT_PATH: &str = "/etc/transship/agent.toml";

/// The port on which agents listen.
pub const DEFAULT_PORT: u16 = 7420;

/// Where the output of a container goes that came from another node.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum StdioPolicy {
    /// Appended to `<log_dir>/<namespace>/<id>.log`.
    #[default]
    Log,
    /// Into FIFOs below `/run/transship/fifo`, for a program of the user's to read.
    Fifo,
}

/// Who needs a ticket to move a container here; see [`super::admission`].
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum TicketPolicy {
    /// Nodes that `accept_from` does not list.
    #[default]
    Unlisted,
    /// Every node.
    Always,
}

/// How containers leave this node, where the command line says nothing: the section `[migration]`.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Migration {
    /// `auto`, `pre-copy`, `post-copy`.
    pub mode: Mode,
    /// For instance `300ms`; kept in milliseconds.
    #[serde(deserialize_with = "duration")]
    pub max_downtime: u64,
    /// For instance `100MB/s`, kept as bytes in a second; `None` for `unlimited`.
    #[serde(deserialize_with = "rate")]
    pub bandwidth: Option<u64>,
    /// `none`, `lz4`, `zstd`, `auto`.
    pub compress: Compression,
    /// `kill`, `thaw`.
    pub on_post_copy_failure: OnPostCopyFailure,
    /// The most rounds before the freeze.
    pub max_rounds: u32,
}

impl Default for Migration {
    fn default() -> Self {
        let Tuning { mode, max_downtime_ms, bandwidth, compress, on_post_copy_failure, max_rounds } =
            Tuning::default();
        Migration {
            mode,
            max_downtime: max_downtime_ms,
            bandwidth,
            compress,
            on_post_copy_failure,
            max_rounds,
        }
    }
}

impl Migration {
    /// What holds for a request: what it asks for, else this section.
    pub fn tuning(&self, asked: &Asked) -> Tuning {
        asked.over(&Tuning {
            mode: self.mode,
            max_downtime_ms: self.max_downtime,
            bandwidth: self.bandwidth,
            compress: self.compress,
            on_post_copy_failure: self.on_post_copy_failure,
            max_rounds: self.max_rounds,
        })
    }
}

fn duration<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    quantity::duration_ms(&String::deserialize(from)?).map_err(D::Error::custom)
}

fn rate<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    quantity::rate(&String::deserialize(from)?).map_err(D::Error::custom)
}

/// The agent's configuration.
#[derive(Deserialize, Clone, Debug, PartialEq)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where peers connect.
    pub listen: SocketAddr,
    /// This node's name in reports; empty: the one in its certificate.
    pub node: String,
    /// The directory with `ca.pem`, `node.pem` and `node.key`.
    pub pki: PathBuf,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// The socket for the command line.
    pub socket: PathBuf,
    /// The bridge to which the containers' networks are attached on this node.
    pub bridge: Option<String>,
    /// Where images live while a migration lasts; on a tmpfs.
    pub images_dir: PathBuf,
    /// The largest open-but-deleted file that is moved, in bytes.
    pub ghost_limit: u32,
    /// Silence of a peer that ends a phase, in seconds.
    pub silence_seconds: u64,
    /// Directories and files of this node that a container from another node may have bind-mounted (each with all
    /// below it).
    pub host_mounts: Vec<PathBuf>,
    /// Where the output of containers from other nodes goes.
    pub stdio: StdioPolicy,
    /// See [`StdioPolicy::Log`].
    pub log_dir: PathBuf,
    /// CRIU's path; else `$TRANSSHIP_CRIU`, else `criu` in PATH.
    pub criu: Option<PathBuf>,
    /// Names of the nodes that may move containers here at any time; `*`: every node with a certificate of our CA.
    pub accept_from: Vec<String>,
    /// Who needs a ticket.
    pub tickets: TicketPolicy,
    /// The largest image that comes with a container, in bytes.
    pub max_image_bytes: u64,
    /// The most containers that may arrive at the same time.
    pub max_incoming: usize,
    /// The most containers that leave this node may stand still at the same time (others are copied meanwhile); 0: half as many as
    /// there are processors.
    pub max_frozen: u32,
    /// How containers leave.
    pub migration: Migration,
    /// What containers that arrive may be.
    pub policy: Policy,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            listen: SocketAddr::from(([0, 0, 0, 0], DEFAULT_PORT)),
            node: String::new(),
            pki: PKI_DIR.into(),
            containerd: CONTAINERD_SOCKET.into(),
            socket: super::api::DEFAULT_SOCKET.into(),
            bridge: None,
            images_dir: Path::new(RUN_DIR).join("images"),
            ghost_limit: 64 << 20,
            silence_seconds: 10,
            host_mounts: Vec::new(),
            stdio: StdioPolicy::Log,
            log_dir: "/var/log/transship".into(),
            criu: None,
            accept_from: Vec::new(),
            tickets: TicketPolicy::Unlisted,
            max_image_bytes: 32 << 30,
            max_incoming: 32,
            max_frozen: 0,
            migration: Migration::default(),
            policy: Policy::default(),
        }
    }
}

impl Config {
    /// Reads the file. A missing file is fine if its path is the default one: everything has a default.
    pub fn load(path: &Path) -> Result<Config> {
        match std::fs::read_to_string(path) {
            Ok(text) => Config::parse(&text).with_context(|| path.display().to_string()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) => {
                Ok(Config::default())
            }
            Err(e) => Err(e).with_context(|| path.display().to_string()),
        }
    }

    /// Reads a configuration's text.
    pub fn parse(text: &str) -> Result<Config> {
        let config: Config = toml::from_str(text)?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<()> {
        ensure!(self.silence_seconds >= 1, "silence_seconds: at least 1");
        ensure!(self.max_incoming >= 1, "max_incoming: at least 1");
        ensure!(
            self.tickets == TicketPolicy::Unlisted || self.accept_from.is_empty(),
            "accept_from: nobody gets in by it where tickets = \"always\"; leave one of the two out"
        );
        ensure!(self.accept_from.iter().all(|n| !n.is_empty()), "accept_from: an empty name");
        let paths = [&self.pki, &self.containerd, &self.socket, &self.images_dir, &self.log_dir];
        for path in paths.into_iter().chain(&self.criu).chain(&self.host_mounts) {
            ensure!(path.is_absolute(), "{}: not an absolute path", path.display());
        }
        if let Some(bridge) = &self.bridge {
            let fine = !bridge.is_empty() && bridge.len() < 16 && !bridge.contains(['/', ' ']);
            ensure!(fine, "bridge: {bridge:?} is no name of a link");
        }
        self.policy.validate()
    }

    /// The directory of certificates.
    pub fn pki(&self) -> Pki {
        Pki::new(&self.pki)
    }

    /// This node's name: as configured, else as in its certificate, else its host name.
    pub fn node_name(&self) -> String {
        if !self.node.is_empty() {
            return self.node.clone();
        }
        self.pki().node_name().unwrap_or_else(|_| {
            nix::unistd::gethostname().map_or_else(|_| "?".into(), |n| n.to_string_lossy().into_owned())
        })
    }

    /// How long a peer may be silent; a request may ask for another limit (0: none asked), between 1 s and 10 minutes.
    pub fn silence(&self, asked_seconds: u64) -> Duration {
        let seconds = if asked_seconds == 0 { self.silence_seconds } else { asked_seconds };
        Duration::from_secs(seconds.clamp(1, 600))
    }

    /// What the shims have to keep to.
    /// `memory_cap`: bytes of memory that a container may bring along.
    pub fn limits(&self, asked_seconds: u64, asked_ghost: u64, memory_cap: u64) -> Limits {
        Limits {
            silence_s: self.silence(asked_seconds).as_secs(),
            ghost_limit: match asked_ghost {
                0 => self.ghost_limit,
                asked => u32::try_from(asked).unwrap_or(u32::MAX),
            },
            criu: self.criu.clone(),
            memory_cap,
            max_frozen: match self.max_frozen {
                0 => std::thread::available_parallelism().map_or(1, |n| (n.get() as u32 / 2).max(1)),
                most => most,
            },
            images_dir: self.images_dir.clone(),
            policy: self.policy.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(Config::parse("").unwrap(), Config::default());
        assert_eq!(Config::default().listen.port(), 7420);
    }

    #[test]
    fn every_key() {
        let text = r#"
            listen = "[::]:7000"
            node = "node-a"
            pki = "/p"
            containerd = "/c.sock"
            socket = "/s.sock"
            bridge = "cni0"
            images_dir = "/i"
            ghost_limit = 1
            silence_seconds = 3
            host_mounts = ["/srv"]
            stdio = "fifo"
            log_dir = "/l"
            criu = "/opt/criu/bin/criu"
            accept_from = ["node-b"]
            tickets = "unlisted"
            max_image_bytes = 5
            max_incoming = 2
            max_frozen = 3
            [migration]
            mode = "pre-copy"
            max_downtime = "1.5s"
            bandwidth = "1Gbit/s"
            compress = "zstd"
            on_post_copy_failure = "thaw"
            max_rounds = 7
            [policy]
            capabilities = ["CAP_NET_ADMIN"]
            privileged = false
            devices = ["/dev/fuse"]
            mount_types = ["fuse"]
            shared_mounts = false
            unmasked_paths = ["/proc/keys"]
            host_namespaces = ["ipc"]
            host_ids = ["100000:65536"]
            cgroup_parents = ["/pods"]
            min_oom_score_adj = -500
            realtime = false
            selinux_types = ["container_t"]
            require = ["seccomp", "apparmor", "no-new-privileges", "user-namespace"]
            annotations = ["example.org/*"]
            labels = ["nerdctl/*"]
            extensions = ["x"]
            runtimes = ["io.containerd.transship.v2"]
            oci_runtimes = ["/opt/runc/bin/runc"]
            runtime_configs = ["/etc/crun.toml"]
            image_names = ["localhost/*"]
        "#;
        let config = Config::parse(text).unwrap();
        assert_eq!((config.stdio, config.bridge.as_deref()), (StdioPolicy::Fifo, Some("cni0")));
        assert_eq!((config.tickets, config.max_image_bytes), (TicketPolicy::Unlisted, 5));
        assert_eq!(config.silence(0), Duration::from_secs(3));
        assert_eq!(config.silence(9999), Duration::from_secs(600));
        assert_eq!(config.limits(0, 0, 1).ghost_limit, 1);
        assert_eq!(config.limits(0, 0, 1).max_frozen, 3);
        assert!(Config::default().limits(0, 0, 1).max_frozen > 0);
        assert_eq!(config.limits(5, 1 << 40, 1).ghost_limit, u32::MAX);
        assert_eq!(config.policy.min_oom_score_adj, -500);
        let want = Tuning {
            mode: Mode::PreCopy,
            max_downtime_ms: 1500,
            bandwidth: Some(125_000_000),
            compress: Compression::Zstd,
            on_post_copy_failure: OnPostCopyFailure::Thaw,
            max_rounds: 7,
        };
        assert_eq!(config.migration.tuning(&Asked::default()), want);
    }

    #[test]
    fn the_command_line_wins_over_the_section_and_the_section_over_the_defaults() {
        let config = Config::parse("[migration]\nbandwidth = '1MB/s'\nmode = 'pre-copy'").unwrap();
        let asked = Asked { mode: Some(Mode::PostCopy), ..Asked::default() };
        let tuning = config.migration.tuning(&asked);
        assert_eq!(
            (tuning.mode, tuning.bandwidth, tuning.max_downtime_ms),
            (Mode::PostCopy, Some(1_000_000), 300)
        );
        let open = Config::parse("[migration]\nbandwidth = 'unlimited'").unwrap();
        assert_eq!(open.migration.tuning(&Asked::default()).bandwidth, None);
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("bridgee = 'x'", "bridgee"),
            ("listen = 'x'", "listen"),
            ("pki = 'p'", "absolute"),
            ("silence_seconds = 0", "silence_seconds"),
            ("bridge = 'a/b'", "bridge"),
            ("host_mounts = ['x']", "absolute"),
            ("stdio = 'tape'", "tape"),
            ("tickets = 'never'", "never"),
            ("accept_from = ['']", "empty"),
            ("tickets = 'always'\naccept_from = ['node-a']", "accept_from"),
            ("[migration]\nmode = 'sideways'", "sideways"),
            ("[policy]\nprivilege = true", "privilege"),
            ("[policy]\ncapabilities = ['ADMIN']", "ADMIN"),
            ("[migration]\nmax_downtime = '300'", "300ms"),
            ("[migration]\nbandwidth = 'fast'", "Gbit/s"),
            ("[migration]\ncompression = 'zstd'", "compression"),
        ] {
            let error = format!("{:#}", Config::parse(text).unwrap_err());
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn only_the_default_file_may_be_missing() {
        assert!(Config::load(Path::new("/nonexistent.toml")).is_err());
    }
}
