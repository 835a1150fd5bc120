//! The file that a move's timeline goes to. It is opened before anything moves, so that a wrong path costs no report, and appears
//! under its name only when it is complete.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use super::summary::of_shim;
use super::timeline::{self, Subject};
use crate::agent::api::{ErrorReport, ExitCode, Report};
use crate::migrate::report::{Phase, Report as ShimReport};

/// Where it goes, and as what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    path: PathBuf,
    page: bool,
}

impl FromStr for Picture {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let path = PathBuf::from(text);
        match path.extension().and_then(|e| e.to_str()) {
            Some("svg") => Ok(Picture { path, page: false }),
            Some("html" | "htm") => Ok(Picture { path, page: true }),
            _ => Err("name a file that ends in .svg or .html".into()),
        }
    }
}

/// A file that waits for its content; dropped, nothing of it is left.
#[derive(Debug)]
pub struct Drawing {
    picture: Picture,
    file: tempfile::NamedTempFile,
}

impl Picture {
    /// Opens a file beside the one that is meant.
    ///
    /// # Errors
    /// [`ExitCode::Usage`]: the directory does not exist or is not writable.
    pub fn begin(&self) -> Result<Drawing, ErrorReport> {
        let dir = match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            _ => Path::new("."),
        };
        let file = tempfile::Builder::new()
            .prefix(".transship-report-")
            .permissions(Permissions::from_mode(0o644))
            .tempfile_in(dir)
            .map_err(|e| {
                ErrorReport::new(ExitCode::Usage, format!("--report {}: {e}", self.path.display()))
                    .state("nothing was begun")
            })?;
        Ok(Drawing { picture: self.clone(), file })
    }
}

impl Drawing {
    /// Draws the move and gives the file its name.
    ///
    /// # Errors
    /// A sentence.
    pub fn write(mut self, report: &Report) -> Result<(), String> {
        let shim = of_shim(report).unwrap_or_else(|| agents_only(report));
        let (container, from, to) = (&report.container, &report.from, &report.to);
        let subject = Subject { container, from, to, report: &shim };
        let text = if self.picture.page { timeline::html(&subject) } else { timeline::svg(&subject) };
        let path = &self.picture.path;
        let failed = |e: std::io::Error| format!("the timeline was not written to {}: {e}", path.display());
        self.file.write_all(text.as_bytes()).map_err(failed)?;
        self.file.persist(path).map(drop).map_err(|e| failed(e.error))
    }
}

/// Without a shim's report (a cold move) the agent's phases are what there is.
fn agents_only(report: &Report) -> ShimReport {
    let mut at = 0.0;
    let phases = report.phases.iter().map(|p| {
        let phase = Phase { name: p.name.clone(), start_ms: at, ms: p.ms };
        at += p.ms;
        phase
    });
    ShimReport {
        migration_id: report.migration.clone(),
        phases: phases.collect(),
        freeze_ms: report.freeze_ms,
        total_ms: report.total_ms,
        bytes_sent: report.bytes_sent,
        warnings: report.warnings.clone(),
        ..ShimReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::api::PhaseTime;

    #[test]
    fn the_ending_says_what_it_is() {
        assert!(!"a/r.svg".parse::<Picture>().unwrap().page);
        assert!("r.html".parse::<Picture>().unwrap().page);
        for bad in ["r", "r.pdf", ".svg", "svg"] {
            assert!(bad.parse::<Picture>().unwrap_err().contains(".svg or .html"), "{bad}");
        }
    }

    #[test]
    fn it_appears_complete_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.svg");
        let picture: Picture = path.to_str().unwrap().parse().unwrap();
        drop(picture.begin().unwrap());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let phases = vec![PhaseTime { name: "layer".into(), ms: 5.0 }];
        let report = Report { container: "redis".into(), cold: true, phases, ..Report::default() };
        picture.begin().unwrap().write(&report).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(roxmltree::Document::parse(&text).unwrap().descendants().any(|n| n.text() == Some("layer")));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_that_is_not_there_is_found_out_first() {
        let picture: Picture = "/nonexistent/r.svg".parse().unwrap();
        let error = picture.begin().unwrap_err();
        assert!(error.code == ExitCode::Usage && error.message.contains("/nonexistent/r.svg"), "{error}");
    }
}
