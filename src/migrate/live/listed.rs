//! What CRIU says while it dumps, on its way to the destination: the pages that there are, and the shared memory that it does not see.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::path::Path;
use std::sync::mpsc;

use anyhow::{Context as _, Result};

use super::super::code_pages::CodePages;
use super::super::shared::{Object, Sent};
use super::super::stream::Sender;
use crate::criu::mm_image::{self, Mappings};
use crate::criu::page_server::page_size;
use crate::criu::{ImageKind, PageEvent, Version};
use crate::memory::store::ADDRESSES;
use crate::memory::tracker::existing::Existing;
use crate::memory::{RangeSet, Space};

/// What [`super::beside`] says of the tasks that CRIU does not see: their private memory, or why that is not known.
pub(super) type Unseen = Result<BTreeMap<Space, Existing>>;

/// Takes what CRIU says. CRIU's calls come one after the other, from different closures: hence the cells.
pub(super) struct Listener<'a> {
    pub sender: RefCell<Sender<'a>>,
    open: Cell<Option<Space>>,
    /// What there is of the space that is open, and of those before it.
    pages: RefCell<RangeSet>,
    listed: RefCell<BTreeMap<Space, RangeSet>>,
    objects: RefCell<Option<mpsc::Sender<Object>>>,
    /// Whom CRIU does not see.
    unseen: HashSet<Space>,
    /// What there is of them; asked once.
    existing: RefCell<Option<mpsc::Receiver<Unseen>>>,
    theirs: RefCell<BTreeMap<Space, Existing>>,
}

impl<'a> Listener<'a> {
    /// `objects` gets the shared memory that CRIU does not see; `existing` tells what there is of these tasks.
    pub fn new(
        sender: Sender<'a>,
        objects: mpsc::Sender<Object>,
        unseen: HashSet<Space>,
        existing: mpsc::Receiver<Unseen>,
    ) -> Listener<'a> {
        Listener {
            sender: RefCell::new(sender),
            open: Cell::new(None),
            pages: RefCell::default(),
            listed: RefCell::default(),
            objects: RefCell::new(Some(objects)),
            unseen,
            existing: RefCell::new(Some(existing)),
            theirs: RefCell::default(),
        }
    }

    /// Passes an event on: code pages as they were, shared memory that the destination has as holes.
    pub fn event(&self, event: PageEvent<'_>, code: &CodePages, shared: &Sent) -> Result<()> {
        if let Some(space) = self.open.get().filter(|space| self.unseen.contains(space)) {
            return match event {
                PageEvent::Close => self.close_unseen(space),
                // of somebody else
                _ => Ok(()),
            };
        }
        match event {
            PageEvent::Open { kind, id } => self.open.set(Some(Space { kind, id })),
            // there may be very many of these, and nothing below changes them
            PageEvent::Hole { vaddr, pages, .. } => {
                self.pages.borrow_mut().insert(vaddr..vaddr + pages * page_size() as u64);
                return self.sender.borrow_mut().pages(event);
            }
            PageEvent::Close => {
                if let Some(space) = self.open.take() {
                    self.listed.borrow_mut().insert(space, self.pages.take());
                }
            }
            PageEvent::Pages { .. } | PageEvent::Idle => {}
        }
        let open = self.open.get();
        let mut send = |event: PageEvent<'_>| self.sender.borrow_mut().pages(event);
        code.mend(open, event, &mut |event| shared.filter(open, event, &mut send))
    }

    /// Ends the image of a task that CRIU does not see, with what there really is.
    fn close_unseen(&self, space: Space) -> Result<()> {
        if let Some(existing) = self.existing.take() {
            let all = existing.recv().context("nobody has looked which pages there are")?;
            self.theirs.replace(all.context("looking which pages there are")?);
        }
        self.open.set(None);
        let mut sender = self.sender.borrow_mut();
        let theirs = self.theirs.borrow();
        let existing = theirs.get(&space).with_context(|| format!("no task is known that has {space:?}"))?;
        sender.exist(&existing.pages)?;
        self.listed.borrow_mut().insert(space, existing.pages.clone());
        sender.pages(PageEvent::Close)
    }

    /// Puts the guard pages of these tasks into their images, which are complete.
    pub fn add_guards(&self, images: &Path, criu: Version) -> Result<()> {
        for (space, existing) in self.theirs.borrow().iter() {
            mm_image::add_guards(images, space.id, &existing.guards, criu)?;
        }
        Ok(())
    }

    /// An object of shared memory that CRIU does not see, in the image that is open.
    pub fn object(&self, file: File) -> Result<()> {
        let space = self.open.get().context("shared memory outside of an image")?;
        let object = Object::new(space, file)?;
        self.sender.borrow_mut().exist(&object.pages)?;
        // whoever takes them has failed if they cannot be sent, and says why
        self.objects.borrow().as_ref().context("shared memory after the dump")?.send(object).ok();
        Ok(())
    }

    /// CRIU is done: no more objects will come.
    pub fn end(&self) {
        self.objects.take();
    }

    /// The pages that CRIU says exist and has not sent itself.
    pub fn listed(&self) -> BTreeMap<Space, RangeSet> {
        self.listed.take()
    }
}

/// Addresses of a task whose pages cannot follow later: its stack is used at once, and the rest CRIU restores itself.
pub(super) fn needed_at_restore(images: &Path, id: u64) -> Result<RangeSet> {
    let mappings = Mappings::read(images, id)?;
    let all = RangeSet::from(0..ADDRESSES);
    Ok(all.difference(&mappings.lazy()).union(&mappings.stacks()))
}

/// What a post-copy may leave behind of `late` pages of a space: (what is to be sent now, what stays).
pub(super) fn split(images: &Path, space: Space, late: RangeSet) -> Result<(RangeSet, RangeSet)> {
    if space.kind != ImageKind::Pid {
        return Ok((late, RangeSet::default()));
    }
    let needed = needed_at_restore(images, space.id)?;
    Ok((late.intersection(&needed), late.difference(&needed)))
}
