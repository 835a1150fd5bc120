//! Part of the fuzz target of CRIU's images: see [`crate::fuzz`]. Images as a stranger may make them, each looked at by itself.

use super::cgroups::{self, Cgroups};
use super::files::File;
use super::mounts::Mount;
use super::seccomp::{Filters, verdicts};
use super::tasks::{Core, Ids, Inventory, Process, UserNamespace};
use super::{image, network};

/// The first byte says which.
pub(crate) fn run(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else { return };
    match which {
        0 => {
            for cgroups in image::entries::<Cgroups>(rest, cgroups::CGROUP_MAGIC).unwrap_or_default() {
                if cgroups::one(&cgroups, false).is_ok() {
                    cgroups::stays_below(&cgroups, "/default/c1");
                }
            }
        }
        1 => verdicts(rest),
        2 => drop(network::tables(&String::from_utf8_lossy(rest))),
        3 => drop(network::nftables(&String::from_utf8_lossy(rest))),
        4 => drop(image::entries::<Mount>(rest, 0)),
        5 => drop(image::entries::<Core>(rest, 0)),
        6 => drop(image::entries::<File>(rest, 0)),
        7 => drop(image::entries::<Filters>(rest, 0)),
        _ => {
            drop(image::entries::<Ids>(rest, 0));
            drop(image::entries::<Inventory>(rest, 0));
            drop(image::entries::<Process>(rest, 0));
            drop(image::entries::<UserNamespace>(rest, 0));
        }
    }
}

/// What a fuzzer begins with.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let rules =
        b"*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i lo -m comment --comment \"a b\" -j ACCEPT\nCOMMIT\n";
    [
        (0, &include_bytes!("recorded/runc-cgroup.img")[..]),
        (0, include_bytes!("recorded/crun-cgroup.img")),
        // the number's load, a comparison, two answers
        (1, b"\x20\0\0\0\0\0\0\0\x15\0\0\x01\x65\0\0\0\x06\0\0\0\0\0\xff\x7f\x06\0\0\0\x01\0\x05\0"),
        (2, rules),
        (3, b"table ip filter {\n\tchain INPUT { policy accept; }\n}\n"),
    ]
    .iter()
    .map(|(which, bytes)| [&[*which][..], bytes].concat())
    .collect()
}
