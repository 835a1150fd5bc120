//! What the matrix found, as a table: a column for each place, a line for each fault.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::{Mutex, PoisonError};

use super::fault::{FAULTS, Fate, Fault};
use super::place::PLACES;

/// What became of one cell.
#[derive(Clone, Debug)]
pub enum Cell {
    /// As it must.
    Held(Fate),
    /// Not as it must: why.
    Broken(String),
}

type Cells = BTreeMap<(usize, usize), Cell>;

static CELLS: Mutex<Cells> = Mutex::new(BTreeMap::new());

/// Writes down what became of one cell; the last try counts.
pub fn note(fault: Fault, place: usize, cell: Cell) {
    let Some(line) = FAULTS.iter().position(|f| *f == fault) else { return };
    CELLS.lock().unwrap_or_else(PoisonError::into_inner).insert((line, place), cell);
}

/// The table of all cells that were tried; nothing if none was.
pub fn table() -> Option<String> {
    let cells = CELLS.lock().unwrap_or_else(PoisonError::into_inner);
    (!cells.is_empty()).then(|| render(&cells))
}

fn render(cells: &Cells) -> String {
    let width = FAULTS.iter().map(|f| f.name().len()).max().unwrap_or(0);
    let mut text = String::from(
        "fault matrix: S runs on the source as before, D runs on the destination, F frozen on the source until resolved,\n\
         E ended with its shim, ! broken, . cannot strike there\n",
    );
    for (n, place) in PLACES.iter().enumerate() {
        let _ = writeln!(text, "{:width$}  {}'- {} ({})", "", "| ".repeat(n), place.point, place.at.name());
    }
    for (line, fault) in FAULTS.iter().enumerate() {
        if !cells.keys().any(|(l, _)| *l == line) {
            continue;
        }
        let _ = write!(text, "{:width$}  ", fault.name());
        for column in 0..PLACES.len() {
            let letter = match cells.get(&(line, column)) {
                Some(Cell::Held(fate)) => fate.letter(),
                Some(Cell::Broken(_)) => '!',
                None => '.',
            };
            let _ = write!(text, "{letter} ");
        }
        text.push('\n');
    }
    let broken: Vec<_> = cells
        .iter()
        .filter_map(|(at, c)| if let Cell::Broken(why) = c { Some((at, why)) } else { None })
        .collect();
    for ((line, column), why) in &broken {
        let _ = writeln!(text, "broken: {} at {}: {why}", FAULTS[*line].name(), PLACES[*column].point);
    }
    let _ = writeln!(text, "fault matrix: {} cells, {} held", cells.len(), cells.len() - broken.len());
    text
}
