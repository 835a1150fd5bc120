//! The writable layer in a live migration, on the source (stub: once, in the freeze).
use super::link::Link;
use super::stream::Sender;
use crate::rootfs::WritableLayer;
use anyhow::Result;
pub(super) struct Layers {
    layer: WritableLayer,
}
#[derive(Default)]
pub(super) struct LayerRound {
    pub bytes: u64,
    pub entries: u64,
}
impl Layers {
    pub fn new(layer: &WritableLayer) -> Result<Layers> {
        Ok(Layers { layer: layer.clone() })
    }
    pub fn round(&mut self, _link: &Link) -> Result<LayerRound> {
        Ok(LayerRound::default())
    }
    pub fn last(&mut self, _pids: &[i32], sender: &mut Sender<'_>) -> Result<()> {
        sender.layer(&self.layer)
    }
}
