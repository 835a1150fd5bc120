//! What seccomp filters let through, compared with the spec: `seccomp.img`.
//!
//! A filter was made by the libseccomp of another node, perhaps an older one, so programs cannot be compared. Their answers can: for each
//! system call of each ABI, what the filter could say is to be no laxer than what the spec says of that name, or by default. Refusing is
//! one thing however it is done (a runtime answers ENOSYS to numbers that its libseccomp does not know, whatever the default is).
//! Arguments are not compared: a call that the spec allows with some of them may be allowed with any.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::bpf::Program;
use super::image;
use super::syscalls::{Abi, HERE, is_known};
use crate::policy::model::{Seccomp, Spec};

const SECCOMP_MAGIC: u32 = 0x6441_3049;

/// The most filters of one task. The kernel counts instructions.
const CHAIN: usize = 256;

/// `seccomp_entry`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filters {
    #[prost(message, repeated, tag = "1")]
    pub all: Vec<Filter>,
}

/// `seccomp_filter`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Filter {
    #[prost(bytes = "vec", required, tag = "1")]
    pub program: Vec<u8>,
    #[prost(uint32, optional, tag = "2")]
    pub previous: Option<u32>,
    #[prost(uint32, optional, tag = "3")]
    pub flags: Option<u32>,
}

/// `SECCOMP_FILTER_FLAG_TSYNC` and `_LOG`, which CRIU notes. Not `_SPEC_ALLOW`: it lets the processor guess more.
const FLAGS: u32 = 1 | 2;

/// What becomes of a system call, the laxest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    /// It is not made: an error, a signal, an end.
    Refused,
    /// A process is asked.
    Asked,
    /// A tracer is asked.
    Traced,
    /// It is made, and logged.
    Logged,
    /// It is made.
    Made,
}

impl Verdict {
    /// The spec's word.
    fn of_action(action: &str) -> Verdict {
        match action {
            "SCMP_ACT_NOTIFY" => Verdict::Asked,
            "SCMP_ACT_TRACE" => Verdict::Traced,
            "SCMP_ACT_LOG" => Verdict::Logged,
            "SCMP_ACT_ALLOW" => Verdict::Made,
            _ => Verdict::Refused,
        }
    }

    /// A filter's answer. What is computed from arguments can be anything.
    fn of_answer(answer: Option<u32>) -> Verdict {
        match answer.map(|a| a & 0xffff_0000) {
            Some(0x7fc0_0000) => Verdict::Asked,
            Some(0x7ff0_0000) => Verdict::Traced,
            Some(0x7ffc_0000) => Verdict::Logged,
            Some(0x7fff_0000) | None => Verdict::Made,
            Some(_) => Verdict::Refused,
        }
    }
}

/// What the spec says, by name.
#[derive(Debug)]
struct Said {
    default: Verdict,
    /// The laxest for each name.
    names: HashMap<String, Verdict>,
    /// Of names that are not known here, and could mean any number that is not known here.
    unknown: Verdict,
    /// Words of ABIs.
    abis: HashSet<String>,
}

impl Said {
    fn of(seccomp: &Seccomp) -> Said {
        let default = Verdict::of_action(&seccomp.default_action);
        let words = |v: Option<&Value>| -> Vec<String> {
            let all = v.and_then(Value::as_array).into_iter().flatten();
            all.filter_map(Value::as_str).map(str::to_string).collect()
        };
        // by name: the laxest of its actions, and whether one of them asks for no arguments
        let mut found: HashMap<String, (Verdict, bool)> = HashMap::new();
        for entry in seccomp.syscalls.iter().flatten() {
            let verdict = Verdict::of_action(&entry.action);
            let always = entry.args.as_ref().and_then(Value::as_array).is_none_or(Vec::is_empty);
            for name in words(entry.names.as_ref()) {
                let (laxest, some) = found.entry(name).or_insert((Verdict::Refused, false));
                *laxest = verdict.max(*laxest);
                *some |= always;
            }
        }
        let names: HashMap<_, _> = found
            .into_iter()
            .map(|(name, (laxest, always))| (name, if always { laxest } else { laxest.max(default) }))
            .collect();
        let unknown = names.iter().filter(|(n, _)| !is_known(n)).map(|(_, v)| *v).fold(default, Verdict::max);
        Said { default, names, unknown, abis: words(seccomp.architectures.as_ref()).into_iter().collect() }
    }

    /// The laxest that may become of a call. `native`: a filter is for that ABI whatever the spec lists.
    fn laxest(&self, abi: Abi, number: u32, native: bool) -> Verdict {
        if !native && !self.abis.contains(abi.word()) {
            return self.default;
        }
        let names = abi.names(number);
        let each = names.iter().map(|n| self.names.get(*n).copied().unwrap_or(self.default));
        each.max().unwrap_or(self.unknown)
    }
}

/// The filters of a checkpoint, of which each chain is looked at once.
pub(super) struct Judge {
    said: Said,
    programs: Vec<(Program, Option<u32>)>,
    /// Last filters of chains that are no laxer than the spec.
    fine: HashSet<u32>,
}

impl Judge {
    /// None: the spec has no filter.
    pub fn new(images: &Path, spec: &Spec) -> Result<Option<Judge>> {
        let Some(seccomp) = spec.linux.as_ref().and_then(|l| l.seccomp.as_ref()) else { return Ok(None) };
        let all: Vec<Filters> = image::read(&images.join("seccomp.img"), SECCOMP_MAGIC)?.unwrap_or_default();
        ensure!(all.len() <= 1, "seccomp.img has {} entries", all.len());
        let mut programs = Vec::new();
        for filter in all.into_iter().flat_map(|f| f.all) {
            let flags = filter.flags.unwrap_or(0);
            ensure!(flags & !FLAGS == 0, "a seccomp filter of the checkpoint has the flags {flags:#x}");
            let program = Program::parse(&filter.program).context("a seccomp filter of the checkpoint");
            programs.push((program?, filter.previous));
        }
        Ok(Some(Judge { said: Said::of(seccomp), programs, fine: HashSet::new() }))
    }

    /// Judges a thread by its last filter.
    pub fn judge(&mut self, last: Option<u32>) -> Result<()> {
        let last = last.context("it has a seccomp filter, but not which")?;
        if self.fine.contains(&last) {
            return Ok(());
        }
        let mut chain: Vec<&Program> = Vec::new();
        let mut next = Some(last);
        while let Some(number) = next {
            let (program, previous) = self
                .programs
                .get(number as usize)
                .with_context(|| format!("there is no seccomp filter {number}"))?;
            ensure!(chain.len() < CHAIN, "it has too many seccomp filters");
            chain.push(program);
            next = *previous;
        }
        for (place, abi) in HERE.iter().enumerate() {
            for number in abi.numbers() {
                let most = self.said.laxest(*abi, number, place == 0);
                if most == Verdict::Made {
                    continue;
                }
                // the kernel takes the strictest of all filters' answers: one that is strict enough will do
                let mut found = Verdict::Made;
                for program in &chain {
                    let answers = program.answers(number, abi.audit()).context("its seccomp filter")?;
                    let laxest =
                        answers.into_iter().map(Verdict::of_answer).max().unwrap_or(Verdict::Refused);
                    found = found.min(laxest);
                    if found <= most {
                        break;
                    }
                }
                if found > most {
                    let name = abi.name(number).unwrap_or("a system call");
                    bail!(
                        "its seccomp filter is laxer than the spec: {name} ({number}, {abi:?}) is {}",
                        if found == Verdict::Made { "allowed" } else { "not refused" }
                    );
                }
            }
        }
        self.fine.insert(last);
        Ok(())
    }
}

/// Every answer of a program from anywhere; for the fuzzer.
#[cfg(any(test, fuzzing))]
pub(super) fn verdicts(program: &[u8]) {
    let Ok(program) = Program::parse(program) else { return };
    for abi in HERE {
        for number in [0, 1, 101, 1 << 30] {
            let answers = program.answers(number, abi.audit()).unwrap_or_default();
            assert!(answers.into_iter().map(Verdict::of_answer).max() <= Some(Verdict::Made));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::super::bpf::tests::program;
    use super::*;

    fn said(json: Value) -> Said {
        Said::of(&Seccomp::deserialize(json).unwrap())
    }

    fn entry(names: &[&str], action: &str, args: bool) -> Value {
        let args = if args {
            serde_json::json!([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}])
        } else {
            Value::Null
        };
        serde_json::json!({"names": names, "action": action, "args": args})
    }

    #[test]
    fn what_a_spec_says_of_a_call() {
        let spec = said(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [
                entry(&["read", "socket", "quite_new"], "SCMP_ACT_ALLOW", false),
                entry(&["clone"], "SCMP_ACT_LOG", true),
                entry(&["ptrace"], "SCMP_ACT_KILL", false),
                entry(&["personality"], "SCMP_ACT_ALLOW", true),
            ]
        }));
        use Verdict::{Logged, Made, Refused};
        for (abi, number, verdict) in [
            (Abi::X86_64, 0, Made),
            (Abi::X86_64, 1, Refused),
            (Abi::X86_64, 56, Logged),
            (Abi::X86_64, 101, Refused),
            (Abi::X86_64, 135, Made),
            (Abi::X86_64, 600, Made), // perhaps quite_new
            (Abi::X86, 3, Made),
            (Abi::X86, 102, Made), // socketcall: socket
            (Abi::X86, 117, Refused),
            (Abi::X32, 1 << 30, Refused), // not listed
        ] {
            assert_eq!(spec.laxest(abi, number, abi == Abi::X86_64), verdict, "{abi:?} {number}");
        }
        let lax = said(serde_json::json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [entry(&["ptrace"], "SCMP_ACT_ERRNO", false), entry(&["clone"], "SCMP_ACT_ERRNO", true)]
        }));
        assert_eq!(lax.laxest(Abi::X86_64, 101, true), Refused);
        assert_eq!(lax.laxest(Abi::X86_64, 56, true), Made, "with other arguments");
        assert_eq!(lax.laxest(Abi::X86, 26, false), Made);
    }

    const ALLOW: u32 = 0x7fff_0000;
    const EPERM: u32 = 0x0005_0001;

    /// Allows these numbers of one ABI.
    fn filter(abi: Abi, numbers: &[u32], otherwise: u32) -> Vec<u8> {
        let mut all =
            vec![(0x20, 0, 0, 4), (0x15, 1, 0, abi.audit()), (0x06, 0, 0, otherwise), (0x20, 0, 0, 0)];
        for number in numbers {
            all.extend([(0x15, 0, 1, *number), (0x06, 0, 0, ALLOW)]);
        }
        all.push((0x06, 0, 0, otherwise));
        program(&all)
    }

    fn judge(filters: Vec<(Vec<u8>, Option<u32>)>, last: Option<u32>) -> Result<()> {
        let said = said(serde_json::json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "syscalls": [entry(&["read", "write"], "SCMP_ACT_ALLOW", false)]
        }));
        let programs =
            filters.into_iter().map(|(p, previous)| (Program::parse(&p).unwrap(), previous)).collect();
        let mut judge = Judge { said, programs, fine: HashSet::new() };
        judge.judge(last)?;
        judge.judge(last)
    }

    fn number(name: &str) -> u32 {
        HERE[0].numbers().find(|n| HERE[0].name(*n) == Some(name)).unwrap()
    }

    #[test]
    fn filters_that_let_more_through() {
        let Some(abi) = HERE.first().copied() else { return };
        let (read, write, ptrace) = (number("read"), number("write"), number("ptrace"));
        let fine = || filter(abi, &[read, write], EPERM);
        judge(vec![(fine(), None)], Some(0)).unwrap();
        judge(vec![(filter(abi, &[read], 0), None)], Some(0)).unwrap(); // stricter, and it kills
        let said = judge(vec![(filter(abi, &[read, write, ptrace], EPERM), None)], Some(0)).unwrap_err();
        assert!(said.to_string().contains("ptrace"), "{said}");
        judge(vec![(program(&[(0x06, 0, 0, ALLOW)]), None)], Some(0)).unwrap_err();
        // logged, traced, somebody asked, or out of an argument: all laxer than refused
        for answer in [0x7ffc_0000, 0x7ff0_0000, 0x7fc0_0000] {
            judge(vec![(filter(abi, &[], answer), None)], Some(0)).unwrap_err();
        }
        judge(vec![(program(&[(0x20, 0, 0, 16), (0x16, 0, 0, 0)]), None)], Some(0)).unwrap_err();
        // a chain is as strict as its strictest
        judge(vec![(fine(), None), (program(&[(0x06, 0, 0, ALLOW)]), Some(0))], Some(1)).unwrap();
        judge(vec![(fine(), None), (program(&[(0x06, 0, 0, ALLOW)]), None)], Some(1)).unwrap_err();
        for (previous, last) in [(None, None), (None, Some(1)), (Some(7), Some(0)), (Some(0), Some(0))] {
            judge(vec![(fine(), previous)], last).unwrap_err();
        }
        // another ABI of the processor, which the spec does not list
        for other in HERE.iter().skip(1) {
            let all =
                vec![(0x20, 0, 0, 4), (0x15, 0, 1, other.audit()), (0x06, 0, 0, ALLOW), (0x06, 0, 0, EPERM)];
            judge(vec![(program(&all), None)], Some(0)).unwrap_err();
        }
    }
}
