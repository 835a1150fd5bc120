//! What this runtime is and can do: `-info` and `-v`.

use std::{
    io::{self, Write},
    process::Command,
};

use anyhow::{Context, Result};
use containerd_shim::protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use crate::{
    bootstrap::{RUNTIME_NAME, read_stdin},
    options, runc,
};

/// `-info`: prints what this runtime is and can do.
pub fn print() -> Result<()> {
    let input = read_stdin()?;
    let any = if input.is_empty() {
        None
    } else {
        Some(Any::parse_from_bytes(&input).context("read the options on stdin")?)
    };
    let options = options::runtime_options(any.as_ref())?;
    let info = RuntimeInfo {
        name: RUNTIME_NAME.into(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        }),
        options: any.into(),
        features: features(runc::binary(&options))?.into(),
        ..Default::default()
    };
    io::stdout().write_all(&info.write_to_bytes().context("encode the answer")?).context("answer containerd")
}

/// What `runc features` prints, in the type under which containerd knows it. A runtime without that command has none.
fn features(binary: &str) -> Result<Option<Any>> {
    let output = Command::new(binary).arg("features").output().with_context(|| format!("run {binary}"))?;
    if !output.status.success() || serde_json::from_slice::<serde::de::IgnoredAny>(&output.stdout).is_err() {
        return Ok(None);
    }
    Ok(Some(Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features".into(),
        value: output.stdout,
        ..Default::default()
    }))
}

/// `-v`.
pub fn print_version() {
    println!("containerd-shim-transship-v2:");
    println!("  Version:  {}", env!("CARGO_PKG_VERSION"));
}
