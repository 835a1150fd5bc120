//! What is done to a migration, and what may become of it: one whole copy, always; which one depends on how far it was.

use super::place::{Place, Side, Stage};

/// Which processes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// The containers' shims.
    Shim,
    /// The node's agent.
    Agent,
    /// The node's containerd.
    Containerd,
    /// CRIU, where it dumps or restores.
    Criu,
    /// runc, where it restores.
    Runc,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Program::Shim => "shim",
            Program::Agent => "agent",
            Program::Containerd => "containerd",
            Program::Criu => "CRIU",
            Program::Runc => "runc",
        }
    }
}

/// Which way the cable lets nothing through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Nothing gets through.
    Both,
    /// Nothing from the source reaches the destination.
    There,
    /// Nothing from the destination reaches the source.
    Back,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Way::Both => "cut",
            Way::There => "cut there",
            Way::Back => "cut back",
        }
    }
}

/// One column of the matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL.
    Killed(Program, Side),
    /// It stops for longer than the silence that ends a migration, connected, and goes on then.
    Silent(Program, Side),
    /// The cable for 2 s, which is shorter than that silence.
    Flutter(Way),
    /// The cable until the migration has ended as it may.
    Cut(Way),
    /// No room where images are.
    Full(Side),
    /// The container's memory cgroup on that side allows no more than it holds.
    MemoryLimit(Side),
    /// The clock of both nodes goes an hour forward, and back.
    Clock,
    /// SIGKILL for `transship migrate`.
    CommandLine,
}

/// What may become of the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It runs on the source, as if nothing had happened.
    Here,
    /// It runs on the destination.
    There,
    /// It ended with its shim, as any container does, and nothing is left of it but its record.
    Ended,
    /// It is frozen on the source, `transship ps` says so, and `transship resolve` ends it.
    Frozen,
}

impl Fate {
    /// In the table.
    pub fn letter(self) -> char {
        match self {
            Fate::Here => 'S',
            Fate::There => 'D',
            Fate::Ended => 'E',
            Fate::Frozen => 'F',
        }
    }
}

impl Fault {
    /// In tables.
    pub fn name(self) -> String {
        match self {
            Fault::Killed(program, side) => format!("{} of the {} killed", program.name(), side.name()),
            Fault::Silent(program, side) => format!("{} of the {} silent", program.name(), side.name()),
            Fault::Flutter(way) => format!("cable {} for 2 s", way.name()),
            Fault::Cut(way) => format!("cable {} for good", way.name()),
            Fault::Full(side) => format!("tmpfs of the {} full", side.name()),
            Fault::MemoryLimit(side) => format!("memory limit on the {}", side.name()),
            Fault::Clock => "clock stepped".into(),
            Fault::CommandLine => "command line killed".into(),
        }
    }

    /// Whether it can strike there at all.
    pub fn applies(self, place: &Place) -> bool {
        match self {
            // there is none yet
            Fault::Killed(Program::Shim, Side::Destination)
            | Fault::Silent(Program::Shim, Side::Destination) => place.stage > Stage::Agents,
            // it waits in front of the freeze, and ends with its dump
            Fault::Killed(Program::Criu, Side::Source) => matches!(place.point, "dump" | "final"),
            Fault::Killed(Program::Criu, Side::Destination) => {
                matches!(place.point, "restoring" | "restore" | "held" | "commit" | "sent" | "committed")
            }
            Fault::Killed(Program::Runc, _) => {
                matches!(place.point, "restoring" | "restore" | "held" | "commit" | "committed" | "running")
            }
            // the cgroup is there, and its tasks have not run
            Fault::MemoryLimit(Side::Destination) => matches!(place.point, "restoring" | "restore"),
            Fault::MemoryLimit(Side::Source) => place.stage < Stage::Sent,
            _ => true,
        }
    }

    /// What may become of the container.
    pub fn allowed(self, place: &Place) -> &'static [Fate] {
        use Fate::{Ended, Frozen, Here, There};
        use Program::{Agent, Containerd, Criu, Runc, Shim};
        use Side::{Destination, Source};
        let stage = place.stage;
        match self {
            // a container ends with its shim
            Fault::Killed(Shim, Source) if stage < Stage::Sent || stage == Stage::Following => &[Ended],
            Fault::Killed(Shim, Source) => &[There],
            Fault::Killed(Shim, Destination) => match stage {
                Stage::Agents | Stage::Copying | Stage::Frozen | Stage::Restoring | Stage::Committing => {
                    &[Here]
                }
                // nothing had run
                Stage::Committed => &[Here],
                // it may have run for a moment: nobody but the operator can say whether that may be forgotten
                Stage::Running | Stage::Sent => &[Frozen, Ended],
                // what it ran on was not complete: the source's copy goes on from its freeze, as was chosen
                Stage::Following => &[Here, Frozen],
                Stage::Done => &[Ended],
            },
            // nothing has been asked of it yet
            Fault::Silent(Shim, Source) if stage == Stage::Agents => &[Here, There],
            // the agents may come back before they are missed: the shims need them only at the end
            Fault::Silent(Agent, _) if stage < Stage::Sent => &[Here, There],
            // the other way is free for the commit
            Fault::Cut(Way::Back) if stage == Stage::Committing => &[Here, There],
            // and it finds it when it goes on
            Fault::Silent(Shim, Destination) if stage == Stage::Committing => &[Here, There],
            Fault::Killed(Agent, _) | Fault::Silent(_, _) | Fault::Cut(_) if stage < Stage::Sent => &[Here],
            Fault::Killed(Agent, _) => &[There],
            // the commit is on its way, and may not arrive
            Fault::Silent(_, _) | Fault::Cut(_) => match stage {
                Stage::Sent | Stage::Committed | Stage::Running | Stage::Done => &[There, Here],
                _ => &[Here, There],
            },
            // the shims go on without containerd
            Fault::Killed(Containerd, _) => match stage {
                Stage::Agents | Stage::Copying | Stage::Frozen | Stage::Restoring | Stage::Committing => {
                    &[Here, There]
                }
                _ => &[There],
            },
            // it had dumped everything, and only had to let go of the tasks
            Fault::Killed(Criu, Source) if place.point == "final" => &[Here, There],
            Fault::Killed(Criu, Source) => &[Here],
            // there the commit is answered at once
            Fault::Killed(Criu | Runc, _) if stage == Stage::Sent => &[There, Here],
            Fault::Killed(Criu | Runc, _) if stage < Stage::Running => &[Here],
            Fault::Killed(Criu | Runc, _) => &[There, Frozen],
            Fault::Full(_) => match stage {
                _ if stage < Stage::Sent => &[Here, There],
                _ => &[There],
            },
            Fault::MemoryLimit(Destination) => &[Here, There],
            // the kernel may kill it for want of memory, as without a migration
            Fault::MemoryLimit(Source) => &[Here, There, Ended],
            Fault::Flutter(_) | Fault::Clock | Fault::CommandLine => &[There],
        }
    }

    /// The silence that ends a migration, in seconds: short where it is waited for.
    pub fn silence(self) -> &'static str {
        match self {
            Fault::Cut(_) | Fault::Silent(..) => "5",
            _ => "20",
        }
    }
}

/// All of them, in the order of the table.
pub const FAULTS: [Fault; 25] = [
    Fault::Killed(Program::Shim, Side::Source),
    Fault::Killed(Program::Shim, Side::Destination),
    Fault::Killed(Program::Agent, Side::Source),
    Fault::Killed(Program::Agent, Side::Destination),
    Fault::Killed(Program::Containerd, Side::Source),
    Fault::Killed(Program::Containerd, Side::Destination),
    Fault::Killed(Program::Criu, Side::Source),
    Fault::Killed(Program::Criu, Side::Destination),
    Fault::Killed(Program::Runc, Side::Destination),
    Fault::Flutter(Way::Both),
    Fault::Flutter(Way::There),
    Fault::Flutter(Way::Back),
    Fault::Cut(Way::Both),
    Fault::Cut(Way::There),
    Fault::Cut(Way::Back),
    Fault::Silent(Program::Shim, Side::Source),
    Fault::Silent(Program::Shim, Side::Destination),
    Fault::Silent(Program::Agent, Side::Source),
    Fault::Silent(Program::Agent, Side::Destination),
    Fault::Full(Side::Source),
    Fault::Full(Side::Destination),
    Fault::MemoryLimit(Side::Source),
    Fault::MemoryLimit(Side::Destination),
    Fault::Clock,
    Fault::CommandLine,
];
