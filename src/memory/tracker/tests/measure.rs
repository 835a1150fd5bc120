//! Figures, by hand: `cargo test --release -p transship --lib memory::tracker::tests::measure -- --ignored --nocapture`.
