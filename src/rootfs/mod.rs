//! The writable layer: captured as entries and applied exactly.
