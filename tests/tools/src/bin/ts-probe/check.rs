//! Checks what another workload left on disk.

use transship_testtools::args::Args;

/// The file must hold the lines 1, 2, 3 ... and end with a whole one.
pub fn append(args: &mut Args) -> Result<(), String> {
    let path = args.position("FILE")?;
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    for (i, line) in text.lines().enumerate() {
        if line.parse() != Ok(i + 1) {
            return Err(format!("{path}: line {} says {line:?}", i + 1));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        return Err(format!("{path}: the last line is torn"));
    }
    println!("{}", text.lines().count());
    Ok(())
}
