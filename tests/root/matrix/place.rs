//! Where in a migration a fault strikes: the phases of issue-speak as fault points, and what is true of each. Data only.

/// One of the two nodes of a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The container comes from there: node a.
    Source,
    /// It goes there: node b.
    Destination,
}

impl Side {
    /// In tables.
    pub fn name(self) -> &'static str {
        match self {
            Side::Source => "source",
            Side::Destination => "destination",
        }
    }
}

/// How far a migration is, as far as its end depends on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// The agents speak; no shim does.
    Agents,
    /// The container runs on the source and is copied.
    Copying,
    /// It stands still on the source; nothing restores it yet.
    Frozen,
    /// The destination restores it, or has.
    Restoring,
    /// The source is about to send the commit.
    Committing,
    /// It was sent, and may be on its way.
    Sent,
    /// The destination has it; nothing has run there.
    Committed,
    /// The gate is open.
    Running,
    /// The source knows that it runs there; memory of it is still here.
    Following,
    /// The source knows it; nothing is missing there.
    Done,
}

/// A point at which a container stands still while something happens to its migration.
#[derive(Debug)]
pub struct Place {
    /// `transship::migrate::fault::POINTS` has it.
    pub point: &'static str,
    /// Who stands still there.
    pub at: Side,
    /// How far the migration is.
    pub stage: Stage,
    /// What its migration is asked for, so that the point is reached.
    pub options: &'static [&'static str],
}

const fn place(point: &'static str, at: Side, stage: Stage) -> Place {
    Place { point, at, stage, options: &[] }
}

/// All of them, in the order of a migration.
pub const PLACES: [Place; 17] = [
    place("offer", Side::Source, Stage::Agents),
    place("prepare", Side::Destination, Stage::Agents),
    place("round", Side::Source, Stage::Copying),
    Place {
        // no page fits into such a downtime at such a rate: it goes on until nothing is gained any more
        options: &["--max-downtime", "1ms", "--bandwidth", "10MB/s"],
        ..place("later-round", Side::Source, Stage::Copying)
    },
    place("frozen", Side::Source, Stage::Frozen),
    place("dump", Side::Source, Stage::Frozen),
    place("final", Side::Source, Stage::Frozen),
    place("restoring", Side::Destination, Stage::Restoring),
    place("restore", Side::Destination, Stage::Restoring),
    place("held", Side::Destination, Stage::Restoring),
    place("commit", Side::Source, Stage::Committing),
    place("sent", Side::Source, Stage::Sent),
    place("committed", Side::Destination, Stage::Committed),
    place("running", Side::Destination, Stage::Running),
    Place {
        options: &["--mode", "post-copy", "--on-post-copy-failure", "thaw"],
        ..place("post-copy", Side::Source, Stage::Following)
    },
    place("done", Side::Source, Stage::Done),
    place("arrived", Side::Destination, Stage::Done),
];

/// The container that stands still at this place.
pub fn id(number: usize) -> String {
    format!("m{number:02}")
}
