//! A layer's directory read into a [`Sink`] at once, by descriptors only: what is looked at is what is sent, even if the
//! tasks run meanwhile and rename things away (a checkpoint of a live container). The walk is that of [`Staged`], whose
//! first and only round this is.

use std::path::Path;

use anyhow::Result;

use super::layer::WritableLayer;
use super::staged::Staged;
use super::writers::Writers;
use super::xattr::OverlayXattrs;
use super::{Sink, Stats};

/// How to read a layer.
#[derive(Clone, Debug)]
pub struct CaptureOptions {
    /// Where overlayfs keeps its marks.
    pub overlay: OverlayXattrs,
    /// Bytes of data handed to the sink at once.
    pub chunk: usize,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        CaptureOptions { overlay: OverlayXattrs::default(), chunk: 1 << 20 }
    }
}

impl CaptureOptions {
    /// Those that fit the layer.
    pub fn for_layer(layer: &WritableLayer) -> Self {
        CaptureOptions { overlay: layer.kind.overlay_xattrs(), ..Self::default() }
    }
}

/// Sends everything below `upper`, and its own attributes, to `sink`; the end mark included.
///
/// The source is not changed; not even its access times are, but for those of symlinks (there is no `O_NOATIME` for
/// readlink).
///
/// # Errors
/// Reading fails; the sink fails; a file is an overlayfs `metacopy`, or another mark says that the layer is not complete
/// by itself; a mount point inside; names nested deeper than [`super::entry::MAX_DEPTH`].
pub fn capture(upper: &Path, options: &CaptureOptions, sink: &mut dyn Sink) -> Result<Stats> {
    Staged::open(upper.to_owned(), options.clone(), false)?.last(&Writers::unknown(), sink)
}
