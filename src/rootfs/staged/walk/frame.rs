//! A directory's names of before and of now, side by side. Pure.

use std::ffi::CString;

use crate::rootfs::staged::Known;

/// A directory being walked.
pub(super) struct Frame<'a> {
    pub(super) known: Known,
    /// None when its names are those of before.
    pub(super) listing: Option<std::vec::IntoIter<CString>>,
    pub(super) olds: std::iter::Peekable<std::slice::Iter<'a, (Box<[u8]>, Known)>>,
}

/// What comes next in a directory.
pub(super) enum Step<'a> {
    Gone(&'a [u8]),
    Look(Box<[u8]>, Option<&'a Known>),
    End,
}

impl<'a> Frame<'a> {
    pub(super) fn next(&mut self) -> Step<'a> {
        let Some(listing) = &mut self.listing else {
            let same = self.olds.next();
            return same.map_or(Step::End, |(name, old)| Step::Look(name.clone(), Some(old)));
        };
        let name = listing.as_slice().first().map(|n| n.to_bytes());
        if let Some((gone, _)) = self.olds.next_if(|(old, _)| name.is_none_or(|n| **old < *n)) {
            return Step::Gone(gone);
        }
        let Some(name) = listing.next() else { return Step::End };
        let old = self.olds.next_if(|(old, _)| **old == *name.to_bytes()).map(|(_, k)| k);
        Step::Look(name.to_bytes().into(), old)
    }
}
