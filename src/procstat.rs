//! The fields of /proc/PID/stat. Which of them means what is its reader's business.

use std::str::FromStr;

/// The field of this number, 3 (the state) and up, as proc_pid_stat(5) counts them.
pub fn field<T: FromStr>(stat: &str, number: usize) -> Option<T> {
    // the name of the program, field 2, is in parentheses and may hold anything
    stat.rsplit_once(')')?.1.split_whitespace().nth(number.checked_sub(3)?)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_behind_any_name() {
        let stat = "75 (a) S b)) R 1 75 x";
        assert_eq!((field(stat, 3), field(stat, 4), field(stat, 5)), (Some('R'), Some(1), Some(75)));
        assert_eq!((field::<u64>(stat, 6), field::<u64>(stat, 7), field::<u64>(stat, 2)), (None, None, None));
        assert_eq!(field::<char>("75 (a", 3), None);
    }
}
