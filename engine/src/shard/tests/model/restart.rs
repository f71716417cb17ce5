//! Crashes and starts, and what must hold after them.

use super::*;
use std::collections::BTreeMap;

impl Test {
    /// False: the disk is so damaged that the shard cannot be opened any more, and says so.
    pub async fn restart(self: &Rc<Self>, in_the_middle: bool) -> bool {
        self.count_mended();
        if self.failed.get() {
            self.profile.calm(&self.machine.disk);
        }
        if !in_the_middle && self.world.one_in(2) {
            self.machine.shard().close().await;
            self.machine.kill();
        } else if self.world.one_in(3) {
            self.machine.kill();
        } else {
            self.machine.crash();
        }
        tracing::debug!(in_the_middle, damages = self.damages(), "down");
        self.profile.hurt(&self.world, &self.machine.disk);
        // A start may itself be cut short.
        while self.world.one_in(4) {
            let (machine, world) = (self.machine.clone(), self.world.clone());
            let starting = self.world.start_process();
            world.spawn(starting, async move { drop(machine.start().await) });
            self.world.sleep(Duration::from_micros(self.world.random_below(8000))).await;
            self.world.kill(starting);
            self.machine.crash();
        }
        if let Err(error) = self.machine.start().await {
            tracing::debug!(%error, "a start failed");
            assert!(self.profile.trouble != Trouble::None, "seed {}: {error}", self.seed());
            self.profile.calm(&self.machine.disk);
            self.machine.crash();
            if let Err(error) = self.machine.start().await {
                assert!(self.damages() > 0, "seed {}: {error}", self.seed());
                return false;
            }
        }
        self.profile.begin(&self.machine.disk);
        self.failed.set(false);
        self.was_full.set(false);
        self.replica.iter().for_each(|replica| replica.introduce(&self.machine));
        self.attach().await;
        true
    }

    async fn attach(self: &Rc<Self>) {
        let client = self.client();
        let opened = client.open_silently(Epoch(client.envelope.get().epoch.0 + 1)).await;
        let seed = self.seed();
        match opened {
            Ok(opened) if opened.missing.is_empty() => {
                assert!(!opened.open_in_previous_epoch, "seed {seed}");
                self.accept_what_is_there().await;
                if !self.failed.get() {
                    self.check_snapshots();
                }
                if let Some(replica) = self.replica.as_ref().filter(|_| !self.failed.get()) {
                    let kept = |block| client.found(block).version();
                    replica.begin_epoch(&self.world, client.envelope.get().epoch, kept).await;
                }
                // A writer says it as soon as it can, and may be late.
                if !self.failed.get() && self.world.one_in(2) {
                    self.retain().await;
                }
            }
            Ok(opened) => {
                assert!(self.damages() > 0, "seed {seed}: {:?} missing", opened.missing);
                self.begin_anew(&opened.missing).await;
            }
            refused => {
                self.is_answered(refused);
            }
        }
    }

    /// Something is lost, and what is lost is refused. The volume is filled by others then; here it is replaced.
    async fn begin_anew(self: &Rc<Self>, missing: &[SliceId]) {
        let client = self.client();
        self.pins.borrow_mut().clear();
        self.stale_since.set(None);
        for extent in 0..EXTENTS {
            let slice = placement(client.volume).slice_of(BlockIndex(extent * 1024).extent());
            let read = client.read(extent * 1024, 1).await;
            let refused = matches!(read, Err(Refusal::NotOwner { .. } | Refusal::NotOpen | Refusal::Disk { .. }));
            assert!(refused || !missing.contains(&slice), "seed {}: lost, and read as {read:?}", self.seed());
        }
        let result = async {
            let dropped = self.machine.shard().drop_volume(client.volume).await;
            dropped.map_err(|error| Refusal::Disk { because: error.to_string() })?;
            let client = Client::try_create(&self.machine, self.next_number()).await?;
            client.open().await?;
            Ok(client)
        };
        match result.await {
            Ok(client) => {
                if let Some(replica) = &self.replica {
                    replica.begin_anew(&self.world, self.last_number.get()).await;
                }
                *self.client.borrow_mut() = client;
                *self.blocks.borrow_mut() = Blocks::default();
            }
            Err(refusal) => {
                self.is_answered::<()>(Err(refusal));
                self.failed.set(true);
            }
        }
    }

    /// What is there after a start is what stays: whatever else was sent must never show again.
    async fn accept_what_is_there(self: &Rc<Self>) {
        let Ok(descriptors) = self.client().describe(Version::ZERO).await else {
            return self.failed.set(true);
        };
        let mut described = BTreeMap::new();
        for descriptor in descriptors {
            for block in descriptor.first.0..descriptor.first.0 + u64::from(descriptor.count) {
                described.insert(block, (descriptor.version, descriptor.checksum.is_some()));
            }
        }
        for extent in 0..EXTENTS {
            let Ok(found) = self.read_extent(extent * 1024).await else { return self.failed.set(true) };
            for (block, found) in (extent * 1024..).zip(found) {
                let described = described.get(&block).copied().unwrap_or((Version::ZERO, false));
                // What is damaged still says which version it is.
                let found = found.unwrap_or(described);
                assert_eq!(described, found, "seed {}: block {block}", self.seed());
                let least = self.blocks.borrow().least(block, self.damages());
                tracing::trace!(block, version = %found.0, data = found.1, "found");
                if !self.blocks.borrow().may_be_back(block, found.0, self.damages()) {
                    self.check(block, found, least);
                }
                self.blocks_now().accept(block, found.0, found.1);
            }
        }
    }
}
