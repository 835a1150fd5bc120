//! The few command-line options the test programs take: positions and `--name value`; no more is needed here.

/// Positions and options as given.
pub struct Args {
    positions: std::collections::VecDeque<String>,
    options: Vec<(String, Option<String>)>,
}

impl Args {
    /// Reads `args`; `flags` lists the option names (without dashes) that take no value.
    pub fn new(args: impl IntoIterator<Item = String>, flags: &[&str]) -> Self {
        let (mut positions, mut options) = (std::collections::VecDeque::new(), Vec::new());
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            match arg.strip_prefix("--") {
                None => positions.push_back(arg),
                Some(name) if flags.contains(&name) => options.push((name.to_owned(), None)),
                Some(name) => match name.split_once('=') {
                    Some((name, value)) => options.push((name.to_owned(), Some(value.to_owned()))),
                    None => options.push((name.to_owned(), args.next())),
                },
            }
        }
        Self { positions, options }
    }

    /// The next position, or an error that names what is missing.
    pub fn position(&mut self, what: &str) -> Result<String, String> {
        self.positions.pop_front().ok_or_else(|| format!("{what} is missing"))
    }

    /// The next position as a number.
    pub fn number(&mut self, what: &str) -> Result<u64, String> {
        let text = self.position(what)?;
        text.parse().map_err(|e| format!("{what} {text:?}: {e}"))
    }

    /// Whether the flag was given.
    pub fn flag(&self, name: &str) -> bool {
        self.options.iter().any(|(n, _)| n == name)
    }

    /// An option's text.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.iter().rev().find(|(n, _)| n == name)?.1.as_deref()
    }

    /// An option's number, or `default` when it is absent.
    pub fn option_number(&self, name: &str, default: u64) -> Result<u64, String> {
        match self.option(name) {
            None => Ok(default),
            Some(text) => text.parse().map_err(|e| format!("--{name} {text:?}: {e}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_options_and_flags() {
        let mut args = Args::new(["a", "--n", "7", "--quiet", "3", "--m=8"].map(String::from), &["quiet"]);
        assert_eq!(args.position("first").as_deref(), Ok("a"));
        assert_eq!(args.number("second"), Ok(3));
        assert!(args.number("third").is_err());
        assert!(args.flag("quiet") && !args.flag("loud"));
        assert_eq!(
            (args.option_number("n", 0), args.option_number("m", 0), args.option_number("x", 5)),
            (Ok(7), Ok(8), Ok(5))
        );
    }
}
