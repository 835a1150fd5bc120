//! Kinds of open files: `files.img`.

use anyhow::{Result, ensure};

use super::{Caps, Measure, Subject, image, names};
use crate::policy::model::Spec;

const FILES_MAGIC: u32 = 0x5630_3138;

/// `file_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct File {
    #[prost(int32, required, tag = "1")]
    pub kind: i32,
    #[prost(message, optional, tag = "3")]
    pub regular: Option<Regular>,
    #[prost(message, optional, tag = "4")]
    pub inet: Option<Inet>,
}

/// `reg_file_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Regular {
    #[prost(string, optional, tag = "6")]
    pub name: Option<String>,
    #[prost(bool, optional, tag = "9")]
    pub external: Option<bool>,
}

/// `inet_sk_entry`.
#[derive(Clone, Copy, PartialEq, prost::Message)]
pub struct Inet {
    #[prost(uint32, optional, tag = "4")]
    pub kind: Option<u32>,
}

// images/fdinfo.proto
const PACKET: i32 = 10;
const FANOTIFY: i32 = 12;
const TUNNEL: i32 = 15;
const EXTERNAL: i32 = 16;
const BPF_MAP: i32 = 19;

pub(super) fn check(subject: &Subject<'_>, spec: &Spec, caps: Caps) -> Result<()> {
    let brought = matches!(subject.measure, Measure::Spec { .. }) && names::has_devices(spec);
    let files: Vec<File> = image::read(&subject.images.join("files.img"), FILES_MAGIC)?.unwrap_or_default();
    files.iter().try_for_each(|f| one(f, brought, caps))
}

/// `brought`: a plugin of CRIU may bring back what was open of a device.
fn one(file: &File, brought: bool, caps: Caps) -> Result<()> {
    let raw = file.inet.as_ref().and_then(|i| i.kind) == Some(libc::SOCK_RAW as u32);
    let needs: (&str, &[&str]) = match file.kind {
        PACKET => ("a packet socket", &["CAP_NET_RAW"]),
        _ if raw => ("a raw socket", &["CAP_NET_RAW"]),
        FANOTIFY => ("a watch over whole file systems", &["CAP_SYS_ADMIN"]),
        TUNNEL => ("a tunnel", &["CAP_NET_ADMIN"]),
        BPF_MAP => ("a BPF map", &["CAP_BPF", "CAP_SYS_ADMIN"]),
        _ => ("", &[]),
    };
    let may = needs.1.is_empty() || needs.1.iter().any(|c| caps.has(c));
    ensure!(may, "the checkpoint has {} open, which takes {}", needs.0, needs.1.join(" or "));
    let external = file.regular.as_ref().is_some_and(|r| r.external == Some(true));
    let odd = external || file.kind == EXTERNAL && !brought;
    ensure!(!odd, "the checkpoint has a file open that is not the container's");
    Ok(())
}
