//! A volume as those who use it have it: requests with their shares, their time limits and what is measured of them.

use super::course::Course;
use super::detached::{Detached, Task};
use super::exports::{Shared, Users};
use super::session::Session;
use crate::device::{Device, Pieces, Run, VolumeError};
use bytes::Bytes;
use futures::future::{Either, select};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::runtime::{Class, Clock, Runtime, Spawn};
use torus_schema::ids::Epoch;
use torus_schema::latency::OperationKind;

/// A client that reconnects within this finds its volume still attached.
const RELEASE_AFTER: Duration = Duration::from_secs(5);

/// One user of an attached volume.
pub struct AttachedVolume<R: Runtime> {
    shared: Rc<Shared<R>>,
    session: Rc<Session<R>>,
    users: Rc<Users>,
}

impl<R: Runtime> AttachedVolume<R> {
    pub fn name(&self) -> &str {
        &self.session.record.name
    }

    /// Whether everything that was answered in the epoch before is there, flushed or not.
    pub fn keeps_all(&self) -> bool {
        self.session.keeps_all.get()
    }

    pub(super) fn new(shared: Rc<Shared<R>>, session: Rc<Session<R>>, users: Rc<Users>) -> Self {
        users.count.set(users.count.get() + 1);
        Self { shared, session, users }
    }

    /// In which it is written; later than that of every writer before.
    pub fn epoch(&self) -> Epoch {
        self.session.epoch
    }

    /// Runs in a task of its own: a caller that goes away abandons the waiting, never what was sent. What has sent
    /// nothing yet when its time is over is given up, so that requests which were answered do not pile up.
    ///
    /// The work is a function, called where its future is to stay: to hand a future on is to copy it.
    async fn detached(
        &self,
        kind: OperationKind,
        work: impl AsyncFnOnce(&Rc<Session<R>>, &Course) -> Result<(), VolumeError> + 'static,
    ) -> Result<(), VolumeError> {
        let request = Detached::new(self.course());
        let (session, task, deadline) = (self.session.clone(), Task(request.clone()), self.deadline());
        let spawn = self.session.runtime.spawn();
        match deadline {
            None => spawn.spawn(Class::Foreground, async move {
                task.tell(work(&session, &task.0.course).await);
            }),
            Some(deadline) => spawn.spawn(Class::Foreground, async move {
                let work = Box::pin(work(&session, &task.0.course));
                match select(work, Box::pin(deadline)).await {
                    Either::Left((result, _)) => task.tell(result),
                    Either::Right((timed_out, work)) => {
                        task.tell(Err(timed_out));
                        if task.0.course.begun.get() {
                            let _ = work.await;
                        }
                    }
                }
            }),
        }
        request.done().await?;
        self.finished(&request.course, kind);
        Ok(())
    }

    fn course(&self) -> Course {
        Course::new(self.session.runtime.clock().now())
    }

    fn finished(&self, course: &Course, kind: OperationKind) {
        course.finished(&self.shared.stages, kind, self.session.runtime.clock().now());
    }

    /// What only looks may be given up at any time.
    async fn timed<T>(&self, look: impl AsyncFnOnce() -> Result<T, VolumeError>) -> Result<T, VolumeError> {
        match self.deadline() {
            None => look().await,
            Some(deadline) => match select(Box::pin(look()), pin!(deadline)).await {
                Either::Left((found, _)) => found,
                Either::Right((timed_out, _)) => Err(timed_out),
            },
        }
    }

    /// Ready when a request that starts now has waited long enough; `None`: there is no such time.
    fn deadline(&self) -> Option<impl Future<Output = VolumeError> + 'static> {
        let timeout = self.shared.io_timeout?;
        let sleep = self.shared.runtime.clock().sleep(timeout);
        let counters = self.shared.counters.clone();
        Some(async move {
            sleep.await;
            counters.io_timeouts.add(1);
            VolumeError::TimedOut { waited_ms: timeout.as_millis() as u64 }
        })
    }
}

impl<R: Runtime> Clone for AttachedVolume<R> {
    fn clone(&self) -> Self {
        Self::new(self.shared.clone(), self.session.clone(), self.users.clone())
    }
}

impl<R: Runtime> Drop for AttachedVolume<R> {
    fn drop(&mut self) {
        self.users.count.set(self.users.count.get() - 1);
        if self.users.count.get() > 0 {
            return;
        }
        let idle = self.users.idle.get() + 1;
        self.users.idle.set(idle);
        let (shared, volume, users) = (self.shared.clone(), self.session.record.id, self.users.clone());
        self.shared.runtime.spawn().spawn(Class::Foreground, async move {
            shared.runtime.clock().sleep(RELEASE_AFTER).await;
            let unused =
                |those: &Users| std::ptr::eq(those, &*users) && those.count.get() == 0 && those.idle.get() == idle;
            let taken = shared.take(volume, unused).await;
            if let Some(session) = taken {
                shared.release(session).await;
            }
        });
    }
}

impl<R: Runtime> Device for AttachedVolume<R> {
    fn size_bytes(&self) -> u64 {
        self.session.size_bytes.get()
    }

    fn read_only(&self) -> bool {
        false
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Pieces, VolumeError> {
        let course = self.course();
        let read = self.timed(async || {
            let _part = self.session.part(&self.session.reading, length).await;
            self.session.read(offset, length, &course).await
        });
        let read = read.await?;
        self.finished(&course, OperationKind::Read);
        Ok(read)
    }

    async fn write(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), VolumeError> {
        let write = async move |session: &Rc<Session<R>>, course: &Course| {
            let _part = session.part(&session.writing, data.len() as u64).await;
            session.write(offset, data, durable, course).await
        };
        self.detached(OperationKind::Write, write).await
    }

    /// In the caller's task: another one, and the way there and back, costs as much as the rest of a small write.
    async fn write_to_end(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), VolumeError> {
        if self.shared.io_timeout.is_some() {
            return Box::pin(self.write(offset, data, durable)).await;
        }
        let course = self.course();
        let _part = self.session.part(&self.session.writing, data.len() as u64).await;
        self.session.write(offset, data, durable, &course).await?;
        self.finished(&course, OperationKind::Write);
        Ok(())
    }

    async fn clear(&self, offset: u64, length: u64, durable: bool, advisory: bool) -> Result<(), VolumeError> {
        let clear = async move |session: &Rc<Session<R>>, course: &Course| {
            let _part = session.part(&session.writing, 0).await;
            session.clear(offset, length, durable, advisory, course).await
        };
        self.detached(OperationKind::Write, clear).await
    }

    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        self.timed(async || {
            let _part = self.session.part(&self.session.reading, 0).await;
            self.session.map(offset, length).await
        })
        .await
    }

    async fn ended(&self) -> String {
        self.session.changed.until(|| self.session.ended.borrow().clone()).await
    }

    async fn resized(&self, seen_bytes: u64) -> u64 {
        let size_bytes = || Some(self.size_bytes()).filter(|size_bytes| *size_bytes != seen_bytes);
        self.session.changed.until(size_bytes).await
    }

    async fn flush(&self) -> Result<(), VolumeError> {
        if self.shared.io_timeout.is_none() && self.session.is_flushed() {
            // Nothing is sent, so nothing that was sent can be abandoned: no task of its own.
            let course = self.course();
            self.session.habit.borrow_mut().flushes();
            self.session.flush_for(&course).await?;
            self.finished(&course, OperationKind::Flush);
            return Ok(());
        }
        let flush = async |session: &Rc<Session<R>>, course: &Course| {
            session.habit.borrow_mut().flushes();
            session.flush_for(course).await
        };
        self.detached(OperationKind::Flush, flush).await
    }
}
