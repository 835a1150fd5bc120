//! `descriptors.json`: what the container's descriptors 0, 1 and 2 were when it was started. `runc restore` requires the file and connects each
//! entry that names a pipe (`pipe:[inode]`) to its own stdio.

use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Deserialize;

/// Where `runc restore` looks, in the images directory.
pub const FILE: &str = "descriptors.json";

#[derive(Deserialize)]
struct RuncState {
    #[serde(default)]
    external_descriptors: Option<Vec<String>>,
}

/// The descriptors of a container: as runc remembers them (`external_descriptors` in its `state.json`), because the init may have
/// redirected its own since while its children still hold the originals; without such a file, as `/proc` shows them now.
pub fn descriptors(state_json: Option<&Path>, pid: i32) -> Result<[String; 3]> {
    if let Some(path) = state_json
        && let Ok(bytes) = std::fs::read(path)
    {
        let state: RuncState =
            serde_json::from_slice(&bytes).with_context(|| format!("reading {}", path.display()))?;
        if let Some(Ok(three)) = state.external_descriptors.map(<[String; 3]>::try_from) {
            return Ok(three);
        }
    }
    let link = |n: usize| {
        std::fs::read_link(format!("/proc/{pid}/fd/{n}")).map(|p| p.to_string_lossy().into_owned())
    };
    // A descriptor that the init has closed is an empty name, as in runc.
    Ok(std::array::from_fn(|n| link(n).unwrap_or_default()))
}

/// Writes the file into the images directory.
pub fn write(images_dir: &Path, descriptors: &[String; 3]) -> Result<()> {
    let path = images_dir.join(FILE);
    let json = serde_json::to_vec(descriptors).context("encoding descriptors")?;
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&path);
    file.and_then(|mut f| std::io::Write::write_all(&mut f, &json))
        .with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runc_remembers_better_than_proc() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state.json");
        std::fs::write(&state, r#"{"id":"x","external_descriptors":["/dev/null","pipe:[7]","pipe:[8]"]}"#)
            .unwrap();
        assert_eq!(descriptors(Some(&state), 1).unwrap(), ["/dev/null", "pipe:[7]", "pipe:[8]"]);
        std::fs::write(&state, r#"{"id":"x","external_descriptors":null}"#).unwrap();
        let own = descriptors(Some(&state), i32::try_from(std::process::id()).unwrap()).unwrap();
        assert_eq!(own[1], std::fs::read_link("/proc/self/fd/1").unwrap().to_string_lossy());
    }

    #[test]
    fn the_file_is_a_json_list() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &["/dev/null".into(), "pipe:[1]".into(), String::new()]).unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join(FILE)).unwrap(), r#"["/dev/null","pipe:[1]",""]"#);
    }
}
