//! A container's network namespace: captured, rebuilt, fenced, announced.

/// Placeholder until the room is filled; see branch `net`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct NetConfig {}
