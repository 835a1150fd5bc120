//! CRIU's RPC messages, the part of `images/rpc.proto` that we use, written by hand so that no code generator is needed.
//!
//! Tag numbers and types are facts of that file (CRIU 3.11 to 4.2). Fields that are absent here are skipped when decoding.
//! Nothing here knows how messages travel: that is [`super::swrk`].

/// What a request asks for and what a response answers (`criu_req_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ReqType {
    /// Never sent on purpose.
    Empty = 0,
    /// Dump a process tree.
    Dump = 1,
    /// Restore a process tree.
    Restore = 2,
    /// `criu check`.
    Check = 3,
    /// A memory-only dump.
    PreDump = 4,
    /// Start a page server.
    PageServer = 5,
    /// An action script's turn, sent by CRIU, answered by us.
    Notify = 6,
    /// Write the CPU's features.
    CpuinfoDump = 7,
    /// Compare the CPU's features.
    CpuinfoCheck = 8,
    /// What the kernel and this CRIU can do.
    FeatureCheck = 9,
    /// CRIU's version.
    Version = 10,
}

/// Where pages go (`criu_page_server_info`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct PageServerInfo {
    /// Host of a TCP page server.
    #[prost(string, optional, tag = "1")]
    pub address: Option<String>,
    /// Its port.
    #[prost(int32, optional, tag = "2")]
    pub port: Option<i32>,
    /// Its pid, in answers.
    #[prost(int32, optional, tag = "3")]
    pub pid: Option<i32>,
    /// A connected socket, by its number in the CRIU process (swrk only).
    #[prost(int32, optional, tag = "4")]
    pub fd: Option<i32>,
}

/// A mount that CRIU leaves to us (`ext_mount_map`).
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ExtMount {
    /// On a dump: the mount point inside the container.
    #[prost(string, required, tag = "1")]
    pub key: String,
    /// On a dump: the name that the image remembers; the restore maps it to a path.
    #[prost(string, required, tag = "2")]
    pub val: String,
}

/// `criu_cg_mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum CgMode {
    /// Cgroups are not looked at.
    Ignore = 0,
    /// Existing cgroups are used, nothing is written.
    None = 1,
    /// Only properties.
    Props = 2,
    /// Missing cgroups are made, properties only in those.
    Soft = 3,
    /// Properties always.
    Full = 4,
    /// Cgroups must not exist.
    Strict = 5,
    /// CRIU's default (soft).
    Default = 6,
}

/// `criu_network_lock_method`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum NetworkLock {
    /// iptables-restore, in the container's netns.
    Iptables = 1,
    /// nft.
    Nftables = 2,
    /// The caller fences the network.
    Skip = 3,
}

/// The options (`criu_opts`).
#[derive(Clone, PartialEq, prost::Message)]
pub struct CriuOpts {
    /// The images directory: a descriptor **of the process that made the RPC socket**, CRIU opens it through `/proc`.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// Root of the tree to dump.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// Leave the tasks alive (in a frozen cgroup: frozen) after the dump.
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    /// Allow unix sockets whose other end is outside.
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    /// Allow established TCP connections.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// Allow a session leader outside the tree.
    #[prost(bool, optional, tag = "7")]
    pub shell_job: Option<bool>,
    /// Dump file locks.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 0 (messages) to 4 (debug).
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// Name of the log in the work directory.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// The page server.
    #[prost(message, optional, tag = "11")]
    pub ps: Option<PageServerInfo>,
    /// Send a NOTIFY at each action script's turn.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// The container's root as the host sees it.
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    /// Directory of the parent images, relative to the images directory.
    #[prost(string, optional, tag = "14")]
    pub parent_img: Option<String>,
    /// Soft-dirty tracking.
    #[prost(bool, optional, tag = "15")]
    pub track_mem: Option<bool>,
    /// Where logs go; as [`CriuOpts::images_dir_fd`].
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// Allow files that were unlinked while another name of them exists.
    #[prost(bool, optional, tag = "18")]
    pub link_remap: Option<bool>,
    /// Mounts left to the restorer.
    #[prost(message, repeated, tag = "23")]
    pub ext_mnt: Vec<ExtMount>,
    /// Older form of [`CriuOpts::manage_cgroups_mode`].
    #[prost(bool, optional, tag = "24")]
    pub manage_cgroups: Option<bool>,
    /// How cgroups are dumped.
    #[prost(enumeration = "CgMode", optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// Largest deleted-but-open file to carry along, bytes.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// `TYPE[inode]:KEY`: resources left to the restorer.
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    /// Namespaces whose content is not dumped: CLONE_NEWNET or nothing.
    #[prost(uint32, optional, tag = "38")]
    pub empty_ns: Option<u32>,
    /// Directory of the cgroup freezer, v1 or v2.
    #[prost(string, optional, tag = "44")]
    pub freeze_cgroup: Option<String>,
    /// Seconds that seizing the tasks may take.
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// Drop connections that nobody has accepted yet.
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    /// Metadata only, pages stay with the tasks.
    #[prost(bool, optional, tag = "48")]
    pub lazy_pages: Option<bool>,
    /// Allow a tty whose master is outside.
    #[prost(bool, optional, tag = "50")]
    pub orphan_pts_master: Option<bool>,
    /// A file whose settings win over those of the RPC.
    #[prost(string, optional, tag = "51")]
    pub config_file: Option<String>,
    /// How CRIU keeps the network still.
    #[prost(enumeration = "NetworkLock", optional, tag = "64")]
    pub network_lock: Option<i32>,
}

/// `criu_req`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CriuReq {
    /// What is asked.
    #[prost(enumeration = "ReqType", required, tag = "1")]
    pub r#type: i32,
    /// With which options.
    #[prost(message, optional, tag = "2")]
    pub opts: Option<CriuOpts>,
    /// In the answer to a NOTIFY: the script succeeded.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
    /// More requests follow.
    #[prost(bool, optional, tag = "4")]
    pub keep_open: Option<bool>,
    /// For FEATURE_CHECK: what to look at.
    #[prost(message, optional, tag = "5")]
    pub features: Option<Features>,
}

/// `criu_features`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Features {
    /// Soft-dirty memory tracking.
    #[prost(bool, optional, tag = "1")]
    pub mem_track: Option<bool>,
    /// Post-copy.
    #[prost(bool, optional, tag = "2")]
    pub lazy_pages: Option<bool>,
    /// pidfd based detection of reused pids.
    #[prost(bool, optional, tag = "3")]
    pub pidfd_store: Option<bool>,
}

/// `criu_restore_resp`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct RestoreResp {
    /// The restored root task.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// `criu_notify`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Notify {
    /// The action's name, such as `post-dump`.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
    /// The root task, where there is one.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
}

/// `criu_version`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct VersionResp {
    /// 4 in 4.2.1.
    #[prost(int32, required, tag = "1")]
    pub major_number: i32,
    /// 2 in 4.2.1.
    #[prost(int32, required, tag = "2")]
    pub minor_number: i32,
    /// Set in builds from a git tree.
    #[prost(string, optional, tag = "3")]
    pub gitid: Option<String>,
    /// 1 in 4.2.1.
    #[prost(int32, optional, tag = "4")]
    pub sublevel: Option<i32>,
}

/// `criu_resp`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CriuResp {
    /// The request's type, or NOTIFY.
    #[prost(enumeration = "ReqType", required, tag = "1")]
    pub r#type: i32,
    /// Done as asked.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// Of a restore.
    #[prost(message, optional, tag = "4")]
    pub restore: Option<RestoreResp>,
    /// Of a NOTIFY.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// An errno, often 0 even on failure.
    #[prost(int32, optional, tag = "7")]
    pub cr_errno: Option<i32>,
    /// Of a FEATURE_CHECK.
    #[prost(message, optional, tag = "8")]
    pub features: Option<Features>,
    /// CRIU's message for requests that it refuses to parse.
    #[prost(string, optional, tag = "9")]
    pub cr_errmsg: Option<String>,
    /// Of a VERSION.
    #[prost(message, optional, tag = "10")]
    pub version: Option<VersionResp>,
}

impl CriuReq {
    /// A request of this type without options.
    pub fn new(kind: ReqType) -> Self {
        Self { r#type: kind as i32, ..Self::default() }
    }

    /// A request of this type with options.
    pub fn with_opts(kind: ReqType, opts: CriuOpts) -> Self {
        Self { opts: Some(opts), ..Self::new(kind) }
    }

    /// The answer to a NOTIFY.
    pub fn notify_answer(success: bool) -> Self {
        Self { notify_success: Some(success), ..Self::new(ReqType::Notify) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Message;

    #[test]
    fn requests_begin_with_the_bytes_that_the_gate_looks_at() {
        assert_eq!(CriuReq::new(ReqType::Version).encode_to_vec(), [0x08, 0x0a]);
        assert_eq!(CriuReq::new(ReqType::Restore).encode_to_vec(), [0x08, 0x02]);
        // `type` is required: prost must write it even when it is the zero value.
        assert_eq!(CriuReq::new(ReqType::Empty).encode_to_vec(), [0x08, 0x00]);
    }

    #[test]
    fn options_carry_the_numbers_of_the_proto() {
        let opts = CriuOpts {
            images_dir_fd: 5,
            network_lock: Some(NetworkLock::Skip as i32),
            ps: Some(PageServerInfo { fd: Some(7), ..Default::default() }),
            ..Default::default()
        };
        // 1: varint 5; 11: message { 4: varint 7 }; 64: varint 3.
        assert_eq!(opts.encode_to_vec(), [0x08, 5, 0x5a, 2, 0x20, 7, 0x80, 0x04, 3]);
    }

    #[test]
    fn unknown_fields_are_skipped() {
        let mut bytes =
            CriuResp { r#type: ReqType::Dump as i32, success: true, ..Default::default() }.encode_to_vec();
        bytes.extend([0xf8, 0x07, 1]); // field 127, varint
        assert!(CriuResp::decode(bytes.as_slice()).unwrap().success);
    }
}
