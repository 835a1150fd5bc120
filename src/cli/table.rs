//! Columns for a terminal.

/// How a column stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Numbers.
    Right,
}

/// Rows below a heading, two blanks between the columns, none at the end of a line.
pub fn render(columns: &[(&str, Align)], rows: &[Vec<String>]) -> String {
    let width = |i: usize| {
        let cells = rows.iter().filter_map(|r| r.get(i)).map(|c| c.chars().count());
        cells.chain([columns[i].0.chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let line = |cells: &[&str]| {
        let mut text = String::new();
        for (i, cell) in cells.iter().enumerate().take(columns.len()) {
            let blanks = " ".repeat(widths[i].saturating_sub(cell.chars().count()));
            if i > 0 {
                text.push_str("  ");
            }
            match columns[i].1 {
                Align::Left => text.extend([*cell, &blanks]),
                Align::Right => text.extend([&blanks, *cell]),
            }
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
        text
    };
    let mut out = line(&columns.iter().map(|c| c.0).collect::<Vec<_>>());
    for row in rows {
        out.push_str(&line(&row.iter().map(String::as_str).collect::<Vec<_>>()));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = vec![vec!["freeze".into(), "7.5".into()], vec!["ü".into(), "1000.0".into()]];
        let text = render(&[("phase", Align::Left), ("ms", Align::Right)], &rows);
        assert_eq!(text, "phase       ms\nfreeze     7.5\nü       1000.0\n");
    }

    #[test]
    fn short_and_long_rows_do_not_panic() {
        let rows = vec![vec![], vec!["a".into(), "b".into(), "c".into()]];
        assert_eq!(render(&[("x", Align::Left)], &rows), "x\n\na\n");
    }
}
