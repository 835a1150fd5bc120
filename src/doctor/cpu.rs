//! The processor: features that processes may be using, and that a destination therefore must have. Comparing two nodes is the
//! preflight's matter; here they are shown.

use super::Finding;

/// What /proc/cpuinfo says of the first processor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The model's name, where the architecture gives one.
    pub model: String,
    /// Feature words, as the kernel spells them.
    pub features: Vec<String>,
}

/// Wide registers and the instructions that libraries choose at start-up: the ones that most often differ between nodes.
const TELLING: [&str; 10] =
    ["avx", "avx2", "avx512f", "avx512vl", "amx_tile", "bmi2", "erms", "pku", "sve", "sve2"];

/// Reads /proc/cpuinfo.
pub fn gather() -> Facts {
    parse(&std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default())
}

fn parse(cpuinfo: &str) -> Facts {
    let field = |names: &[&str]| {
        cpuinfo
            .lines()
            .filter_map(|l| l.split_once(':'))
            .find(|(k, _)| names.contains(&k.trim()))
            .map(|(_, v)| v.trim().to_string())
            .unwrap_or_default()
    };
    Facts {
        model: field(&["model name", "CPU part"]),
        features: field(&["flags", "Features"]).split_whitespace().map(str::to_string).collect(),
    }
}

/// Never a failure by itself.
pub fn verdict(facts: &Facts) -> Finding {
    if facts.features.is_empty() {
        return Finding::warn(
            "cpu",
            "no features are listed in /proc/cpuinfo",
            "nodes cannot be compared: a move may end in an illegal instruction",
        );
    }
    let telling: Vec<_> = TELLING.iter().copied().filter(|t| facts.features.iter().any(|f| f == t)).collect();
    Finding::ok(
        "cpu",
        format!("{}, {} features: {} ..", facts.model, facts.features.len(), telling.join(" ")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Level;

    #[test]
    fn both_architectures_spellings_are_read() {
        let x86 = parse("processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 pku\n");
        assert_eq!(x86.model, "Fast CPU");
        assert_eq!(x86.features, ["fpu", "avx2", "pku"]);
        let arm = parse("processor\t: 0\nFeatures\t: fp sve\nCPU part\t: 0xd40\n");
        assert_eq!(arm.features, ["fp", "sve"]);
        assert!(verdict(&x86).found.contains("avx2 pku"));
    }

    #[test]
    fn an_unreadable_list_warns() {
        assert_eq!(verdict(&parse("")).level, Level::Warn);
    }
}
