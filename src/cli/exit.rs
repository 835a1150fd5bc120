//! Exit statuses as the help and the README show them. The numbers themselves are [`ExitCode`]'s: the agent chooses them.

use std::sync::LazyLock;

use crate::agent::api::ExitCode;

/// The end of `transship --help`.
pub static HELP: LazyLock<String> = LazyLock::new(|| {
    let mut text = String::from("Exit status:\n");
    for (code, meaning) in ExitCode::ALL {
        text.push_str(&format!("  {:>2}  {meaning}\n", code.code()));
    }
    text.push_str("\nErrors say what failed, on which node and in which phase, what state everything is in now, and what to do.");
    text
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_all_in_the_help() {
        let mut numbers: Vec<u8> = ExitCode::ALL.iter().map(|(c, _)| c.code()).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), ExitCode::ALL.len());
        for number in numbers {
            assert!(HELP.lines().any(|l| l.trim_start().starts_with(&format!("{number} "))), "{number}");
        }
    }

    #[test]
    fn the_readme_lists_them_all() {
        let readme = include_str!("../../README.md");
        for (code, meaning) in ExitCode::ALL {
            let row = format!("| {} | {meaning} |", code.code());
            assert!(readme.contains(&row), "README.md lacks the row: {row}");
        }
    }
}
