//! A seccomp filter's verdicts: classic BPF, run for a system call of which the number and the ABI are known and the arguments are not.
//!
//! Where a decision hangs on an argument both ways are followed, so what comes out is everything that the filter could say: perhaps more
//! than it ever does, never less. Programs only jump forwards, so each run ends.

use std::collections::HashSet;

use anyhow::{Context, Result, bail, ensure};

/// The most instructions that the kernel takes.
const LONGEST: usize = 4096;
/// The most ways that are followed for one system call. libseccomp's programs have some ten.
const WAYS: usize = 4096;
/// `struct seccomp_data`
const DATA: u32 = 64;

/// `struct sock_filter`
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u16,
    yes: u8,
    no: u8,
    k: u32,
}

/// A filter.
#[derive(Clone, Debug)]
pub(super) struct Program(Vec<Instruction>);

/// A value, if it is known.
type Word = Option<u32>;

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct State {
    at: usize,
    a: Word,
    x: Word,
    memory: [Word; 16],
}

// linux/bpf_common.h
const LD: u16 = 0;
const LDX: u16 = 1;
const ST: u16 = 2;
const STX: u16 = 3;
const ALU: u16 = 4;
const JMP: u16 = 5;
const RET: u16 = 6;
const MISC: u16 = 7;
const OPERAND_X: u16 = 8;

/// What an instruction comes to.
enum Step {
    Go,
    /// The filter's answer; unknown when it hangs on an argument.
    Answer(Word),
    /// One of two, by numbers of instructions to be left out.
    Jump(Option<bool>, u32, u32),
}

impl Program {
    /// From an image: eight bytes each.
    pub fn parse(bytes: &[u8]) -> Result<Program> {
        let (all, rest) = bytes.as_chunks::<8>();
        ensure!(rest.is_empty() && !all.is_empty() && all.len() <= LONGEST, "{} bytes", bytes.len());
        let one = |b: &[u8; 8]| Instruction {
            code: u16::from_ne_bytes([b[0], b[1]]),
            yes: b[2],
            no: b[3],
            k: u32::from_ne_bytes([b[4], b[5], b[6], b[7]]),
        };
        Ok(Program(all.iter().map(one).collect()))
    }

    /// Every answer that it could give for a system call. `None` among them: one that is computed from arguments.
    ///
    /// # Errors
    /// It is no program that the kernel would take, or too tangled to follow.
    pub fn answers(&self, number: u32, abi: u32) -> Result<HashSet<Word>> {
        let mut answers = HashSet::new();
        let mut seen = HashSet::new();
        let mut todo = vec![State { at: 0, a: Some(0), x: Some(0), memory: [Some(0); 16] }];
        while let Some(mut state) = todo.pop() {
            loop {
                let instruction = self.0.get(state.at).context("a way out of the program")?;
                state.at += 1;
                match state.step(*instruction, number, abi)? {
                    Step::Go => {}
                    Step::Answer(answer) => {
                        answers.insert(answer);
                        break;
                    }
                    Step::Jump(Some(taken), yes, no) => state.at += if taken { yes } else { no } as usize,
                    Step::Jump(None, yes, no) => {
                        let mut other = state.clone();
                        other.at += no as usize;
                        state.at += yes as usize;
                        if seen.insert(other.clone()) {
                            todo.push(other);
                        }
                        if !seen.insert(state.clone()) {
                            break;
                        }
                        ensure!(seen.len() <= WAYS, "too many ways through it");
                    }
                }
            }
        }
        Ok(answers)
    }
}

impl State {
    fn step(&mut self, i: Instruction, number: u32, abi: u32) -> Result<Step> {
        let operand = if i.code & OPERAND_X != 0 { self.x } else { Some(i.k) };
        match i.code & 7 {
            LD | LDX => {
                let value = match (i.code & 7, i.code & !7) {
                    (_, 0x00) => Some(i.k),
                    (LD, 0x20) => match i.k {
                        0 => Some(number),
                        4 => Some(abi),
                        at if at < DATA && at % 4 == 0 => None,
                        at => bail!("it reads at {at}"),
                    },
                    (_, 0x60) => *self.memory.get(i.k as usize).context("it reads beyond its memory")?,
                    (_, 0x80) => Some(DATA),
                    _ => bail!("the instruction {:#x}", i.code),
                };
                if i.code & 7 == LD { self.a = value } else { self.x = value }
            }
            ST | STX if i.code & !7 == 0 => {
                let value = if i.code == ST { self.a } else { self.x };
                *self.memory.get_mut(i.k as usize).context("it writes beyond its memory")? = value;
            }
            ALU => self.a = calculated(i.code & 0xf0, self.a, operand)?,
            JMP if i.code == JMP => return Ok(Step::Jump(Some(true), i.k, 0)),
            JMP => {
                let test: fn(u32, u32) -> bool = match i.code & 0xf0 {
                    0x10 => |a, b| a == b,
                    0x20 => |a, b| a > b,
                    0x30 => |a, b| a >= b,
                    0x40 => |a, b| a & b != 0,
                    _ => bail!("the instruction {:#x}", i.code),
                };
                let taken = self.a.zip(operand).map(|(a, b)| test(a, b));
                return Ok(Step::Jump(taken, i.yes.into(), i.no.into()));
            }
            RET => {
                return match i.code {
                    0x06 => Ok(Step::Answer(Some(i.k))),
                    0x16 => Ok(Step::Answer(self.a)),
                    other => bail!("the instruction {other:#x}"),
                };
            }
            MISC if i.code == 0x07 => self.x = self.a,
            MISC if i.code == 0x87 => self.a = self.x,
            _ => bail!("the instruction {:#x}", i.code),
        }
        Ok(Step::Go)
    }
}

fn calculated(operation: u16, a: Word, b: Word) -> Result<Word> {
    let (Some(a), Some(b)) = (a, b) else { return Ok(None) };
    Ok(match operation {
        0x00 => Some(a.wrapping_add(b)),
        0x10 => Some(a.wrapping_sub(b)),
        0x20 => Some(a.wrapping_mul(b)),
        0x30 => a.checked_div(b),
        0x40 => Some(a | b),
        0x50 => Some(a & b),
        0x60 => Some(a.checked_shl(b).unwrap_or(0)),
        0x70 => Some(a.checked_shr(b).unwrap_or(0)),
        0x80 => Some(a.wrapping_neg()),
        0xa0 => Some(a ^ b),
        other => bail!("the operation {other:#x}"),
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A program of (code, yes, no, k).
    pub fn program(all: &[(u16, u8, u8, u32)]) -> Vec<u8> {
        let one = |(code, yes, no, k): &(u16, u8, u8, u32)| {
            [&code.to_ne_bytes()[..], &[*yes, *no], &k.to_ne_bytes()].concat()
        };
        all.iter().flat_map(one).collect()
    }

    fn answers(all: &[(u16, u8, u8, u32)], number: u32) -> Result<Vec<Word>> {
        let mut found: Vec<_> = Program::parse(&program(all))?.answers(number, 7)?.into_iter().collect();
        found.sort();
        Ok(found)
    }

    #[test]
    fn numbers_and_abis_decide_and_arguments_leave_it_open() {
        let filter = [
            (0x20, 0, 0, 4),    // the ABI
            (0x15, 1, 0, 7),    // is it 7?
            (0x06, 0, 0, 1),    // no: 1
            (0x20, 0, 0, 0),    // the number
            (0x15, 0, 4, 42),   // 42?
            (0x20, 0, 0, 16),   // the first argument
            (0x54, 0, 0, 0xff), // of which some bits
            (0x15, 0, 1, 3),    // are they 3?
            (0x06, 0, 0, 2),    // 2
            (0x35, 0, 1, 50),   // at least 50? (for 42: what is left of the argument)
            (0x06, 0, 0, 3),    // 3
            (0x06, 0, 0, 4),    // 4
        ];
        assert_eq!(answers(&filter, 42).unwrap(), [Some(2), Some(3), Some(4)]);
        assert_eq!(answers(&filter, 49).unwrap(), [Some(4)]);
        assert_eq!(answers(&filter, 50).unwrap(), [Some(3)]);
        let other = Program::parse(&program(&filter)).unwrap().answers(42, 8).unwrap();
        assert_eq!(other, HashSet::from([Some(1)]));
    }

    #[test]
    fn calculations_and_memory() {
        for (operation, k, result) in [
            (0x04, 3, 13),
            (0x14, 3, 7),
            (0x24, 3, 30),
            (0x34, 3, 3),
            (0x44, 5, 15),
            (0x54, 6, 2),
            (0x64, 2, 40),
            (0x74, 1, 5),
            (0x64, 32, 0),
            (0x84, 0, 10u32.wrapping_neg()),
            (0xa4, 3, 9),
        ] {
            // by a constant, and by X through memory
            let direct = [(0x00, 0, 0, 10), (operation, 0, 0, k), (0x16, 0, 0, 0)];
            assert_eq!(answers(&direct, 0).unwrap(), [Some(result)], "{operation:#x}");
            let by_x = [
                (0x00, 0, 0, k),
                (0x02, 0, 0, 5),
                (0x61, 0, 0, 5),
                (0x00, 0, 0, 10),
                (operation | 8, 0, 0, 0),
                (0x07, 0, 0, 0),
                (0x00, 0, 0, 0),
                (0x87, 0, 0, 0),
                (0x05, 0, 0, 1),
                (0x06, 0, 0, 99),
                (0x16, 0, 0, 0),
            ];
            assert_eq!(answers(&by_x, 0).unwrap(), [Some(result)], "{operation:#x} by X");
        }
        // an answer out of an argument
        assert_eq!(answers(&[(0x20, 0, 0, 16), (0x16, 0, 0, 0)], 0).unwrap(), [None]);
        assert_eq!(answers(&[(0x80, 0, 0, 0), (0x16, 0, 0, 0)], 0).unwrap(), [Some(64)]);
    }

    #[test]
    fn what_is_no_program() {
        for wrong in [
            &[(0x00, 0, 0, 1)][..],
            &[(0x05, 0, 0, 7), (0x06, 0, 0, 0)],
            &[(0x20, 0, 0, 64), (0x06, 0, 0, 0)],
            &[(0x20, 0, 0, 2), (0x06, 0, 0, 0)],
            &[(0x02, 0, 0, 16), (0x06, 0, 0, 0)],
            &[(0x28, 0, 0, 0), (0x06, 0, 0, 0)],
            &[(0x94, 0, 0, 3), (0x06, 0, 0, 0)],
            &[(0x0e, 0, 0, 0)],
        ] {
            assert!(answers(wrong, 0).is_err(), "{wrong:?}");
        }
        assert!(Program::parse(&[]).is_err() && Program::parse(&[0; 9]).is_err());
        assert!(Program::parse(&vec![0; 8 * (LONGEST + 1)]).is_err());
        // a sum of the ways taken: twice as many with each argument
        let mut tangled = vec![(0x01, 0, 0, 0)];
        for bit in 0..20 {
            tangled.extend([
                (0x20, 0, 0, 16),
                (0x15, 0, 3, bit),
                (0x87, 0, 0, 0),
                (0x04, 0, 0, 1 << bit),
                (0x07, 0, 0, 0),
            ]);
        }
        tangled.push((0x06, 0, 0, 0));
        assert!(answers(&tangled, 0).unwrap_err().to_string().contains("too many ways"));
    }
}
