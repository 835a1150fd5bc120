//! stub
use super::page_server::PageEvent;
use crate::memory::{RangeSet, Space, store::Store};
use anyhow::Result;
use std::path::Path;
#[derive(Default, Clone, Debug)]
pub struct Plan {
    pub lazy: Vec<(Space, RangeSet)>,
    pub remote: Vec<(Space, RangeSet)>,
    pub eager_bytes: u64,
    pub lazy_bytes: u64,
}
#[derive(Default)]
pub struct EagerPolicy {
    pub eager_max: u64,
    pub hot_max: u64,
}
pub struct Planner;
impl Planner {
    pub fn new(_: &Path, _: EagerPolicy) -> Self {
        Planner
    }
    pub fn event(&mut self, _: PageEvent<'_>) -> Result<()> {
        Ok(())
    }
    pub fn finish(self, _: &Store, _: &[(Space, RangeSet)], _: &[(Space, RangeSet)]) -> Result<Plan> {
        Ok(Plan::default())
    }
}
pub fn needed_at_restore(_: &Path, _: u64) -> Result<RangeSet> {
    Ok(RangeSet::new())
}
