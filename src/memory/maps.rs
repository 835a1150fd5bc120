//! maps.
