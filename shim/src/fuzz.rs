//! The fuzz target of what containerd hands to the shim. It is like those of the library (`src/fuzz.rs` there says what a target is),
//! but for the library's own table, which is not built for this crate's tests.

/// The bootstrap message, options, a container's specification, stdio URIs.
pub mod shim_requests {
    use std::ffi::OsString;
    use std::path::Path;

    use containerd_shim::{
        StartOpts,
        bootstrap::{BootstrapParams, Extension},
        protos::protobuf::{Message, MessageField, well_known_types::any::Any},
    };
    use containerd_shim_protos::shim::oci::CheckpointOptions;

    use crate::io::uri;
    use crate::{bootstrap, cri, mounts, options};

    /// The target's body.
    pub fn run(data: &[u8]) {
        let Some((how, bytes)) = data.split_first() else { return };
        match how {
            0 => {
                let Ok(Some(params)) = bootstrap::bootstrap_message(bytes, "c1", "ns") else { return };
                let opts = StartOpts::from(params);
                assert_eq!((opts.id.as_str(), opts.namespace.as_str()), ("c1", "ns"));
                opts.socket_address("c1");
                opts.extensions.iter().for_each(any);
            }
            1 => {
                if let Ok(message) = Any::parse_from_bytes(bytes) {
                    any(&message);
                }
            }
            2 => drop(options::from_toml(&String::from_utf8_lossy(bytes))),
            3 => drop(cri::home(bytes, "c1")),
            4 => {
                let text = String::from_utf8_lossy(bytes);
                if let Ok(uri::Target::Binary(program)) = uri::parse(&text) {
                    assert!(program.path.is_absolute() && program.args.len().is_multiple_of(2));
                    let keys: Vec<&OsString> = program.args.iter().step_by(2).collect();
                    assert!(keys.iter().enumerate().all(|(n, key)| !keys[..n].contains(key)));
                }
            }
            _ => {
                let root = Path::new("/b/rootfs");
                if let Ok(path) = mounts::inside(root, &String::from_utf8_lossy(bytes)) {
                    assert!(path.starts_with(root) && !path.components().any(|c| c.as_os_str() == ".."));
                }
            }
        }
    }

    fn any(any: &Any) {
        if let Ok(all) = options::runtime_options(Some(any)) {
            let again = all.write_to_bytes().expect("it was read");
            assert_eq!(options::RuncOptions::parse_from_bytes(&again).expect("it was written"), all);
        }
        drop(options::checkpoint_args(Some(any), Path::new("/img"), Path::new("/work")));
    }

    /// Inputs that make sense.
    pub fn seeds() -> Vec<Vec<u8>> {
        let packed = |kind: &str, value: Vec<u8>| Any { type_url: kind.into(), value, ..Default::default() };
        let runc = options::RuncOptions {
            binary_name: "crun".into(),
            root: "/r".into(),
            systemd_cgroup: true,
            ..Default::default()
        };
        let runc = packed("containerd.runc.v1.Options", runc.write_to_bytes().expect("a message"));
        let toml = b"BinaryName = \"crun\"\nSystemdCgroup = true\nRoot = \"/r\"\nio_uid = 5\n";
        // type_url = 1, config_path = 2, config_body = 3
        let generic = [&[0x0a, 1, b'x', 0x1a, toml.len() as u8][..], toml].concat();
        let missing = b"\x12\x08/nowhere".to_vec();
        let checkpoint = CheckpointOptions { exit: true, work_path: "/w".into(), ..Default::default() };
        let checkpoint = [checkpoint.write_to_bytes().expect("a message"), b"\x52\x04../p".to_vec()].concat();
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "ns".into(),
            containerd_grpc_address: "/run/c.sock".into(),
            containerd_ttrpc_address: "/run/c.sock.ttrpc".into(),
            extensions: vec![Extension { value: MessageField::some(runc.clone()), ..Default::default() }],
            ..Default::default()
        };
        let anys = [
            runc,
            packed("types.containerd.io/runtimeoptions.v1.Options", generic),
            packed("runtimeoptions.v1.Options", missing),
            packed("containerd.runc.v1.CheckpointOptions", checkpoint),
        ];
        let spec = br#"{"annotations":{"io.kubernetes.cri.container-type":"container","io.kubernetes.cri.sandbox-id":"s1"},
                        "mounts":[{"source":"proc"},{"source":"/x/sandboxes/s1/hostname"}]}"#;
        let mut seeds = vec![[&[0][..], &params.write_to_bytes().expect("a message")].concat()];
        seeds.extend(anys.iter().map(|a| [&[1][..], &a.write_to_bytes().expect("a message")].concat()));
        seeds.push([&[2][..], toml].concat());
        seeds.push([&[3][..], spec].concat());
        for text in [
            "binary:///usr/bin/log?id=a%2Fb+c&flag&id=second",
            "file:///var/log/a%20b.log",
            "/run/x/1-stdout",
        ] {
            seeds.push([&[4][..], text.as_bytes()].concat());
        }
        seeds.push(b"\x05/a/./b".to_vec());
        seeds
    }
}

#[cfg(test)]
mod tests {
    use super::shim_requests::{run, seeds};

    /// As the library replays its targets' corpora.
    #[test]
    fn shim_requests() {
        let dir = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/shim_requests");
        let files = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
        let kept: Vec<_> =
            files.map(|path| (path.display().to_string(), std::fs::read(path).unwrap())).collect();
        assert!(!kept.is_empty(), "nothing in {dir}");
        let seeds = seeds().into_iter().enumerate().map(|(n, seed)| (format!("its seed {n}"), seed));
        for (name, bytes) in seeds.chain(kept) {
            if let Err(panic) = std::panic::catch_unwind(|| run(&bytes)) {
                eprintln!("the target shim_requests fails on {name}");
                std::panic::resume_unwind(panic);
            }
        }
    }

    /// Not a test: see the library's `fuzz::tests::write_seeds`.
    #[test]
    #[ignore = "a tool of hack/fuzz"]
    fn write_seeds() {
        let Some(to) = std::env::var_os("TRANSSHIP_SEEDS") else { return };
        let dir = std::path::Path::new(&to).join("shim_requests");
        std::fs::create_dir_all(&dir).unwrap();
        for (n, seed) in seeds().iter().enumerate() {
            std::fs::write(dir.join(format!("seed-{n:02}")), seed).unwrap();
        }
    }
}
