//! The tasks that get the guest's packets, each by the two ends that it connects.
//!
//! Invariant: a task that has ended, however, is not in the table; the packets that wait for all tasks are bounded.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::sync::mpsc;

/// How many packets wait for one task.
const QUEUE: usize = 32;
/// How many bytes wait for all tasks of a table.
const QUEUED_BYTES_MAX: usize = 16 << 20;

/// A connection, as both ends name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The guest's end.
    pub guest: SocketAddr,
    /// What the guest connects to.
    pub remote: SocketAddr,
}

#[derive(Debug)]
struct Task {
    number: u64,
    packets: mpsc::Sender<Vec<u8>>,
}

/// A table of tasks.
#[derive(Debug, Default)]
pub struct Tasks {
    tasks: RefCell<HashMap<FlowKey, Task>>,
    last: Cell<u64>,
    queued: Cell<usize>,
}

impl Tasks {
    /// How many there are.
    pub fn count(&self) -> usize {
        self.tasks.borrow().len()
    }

    /// Whether there is a task for these ends.
    pub fn has(&self, key: &FlowKey) -> bool {
        self.tasks.borrow().contains_key(key)
    }

    /// A place for a task, from which it gets its packets. It is free again when this is dropped.
    pub fn open(self: &Rc<Self>, key: FlowKey) -> Packets {
        let (packets, queue) = mpsc::channel(QUEUE);
        let number = self.last.get() + 1;
        self.last.set(number);
        self.tasks.borrow_mut().insert(key, Task { number, packets });
        Packets { tasks: Rc::clone(self), key, number, queue }
    }

    /// Gives a packet to the task of its connection; `false` if no task has that connection.
    pub fn pass(&self, key: &FlowKey, packet: &[u8]) -> bool {
        let tasks = self.tasks.borrow();
        let Some(task) = tasks.get(key) else { return false };
        // One that finds no room is lost, as on any network.
        let queued = self.queued.get() + packet.len();
        if queued <= QUEUED_BYTES_MAX && task.packets.try_send(packet.to_vec()).is_ok() {
            self.queued.set(queued);
        }
        true
    }

    /// Takes the packets from all tasks that are not to stay.
    pub fn retain(&self, stays: impl Fn(&FlowKey) -> bool) {
        self.tasks.borrow_mut().retain(|key, _| stays(key));
    }
}

/// The packets of one task.
#[derive(Debug)]
pub struct Packets {
    tasks: Rc<Tasks>,
    key: FlowKey,
    number: u64,
    queue: mpsc::Receiver<Vec<u8>>,
}

impl Packets {
    /// The next packet; `None` if the task is to end.
    pub async fn next(&mut self) -> Option<Vec<u8>> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// The same as [`Self::next`].
    pub fn poll_next(&mut self, context: &mut std::task::Context<'_>) -> std::task::Poll<Option<Vec<u8>>> {
        let next = self.queue.poll_recv(context);
        if let std::task::Poll::Ready(Some(packet)) = &next {
            self.tasks.queued.set(self.tasks.queued.get().saturating_sub(packet.len()));
        }
        next
    }
}

impl Drop for Packets {
    fn drop(&mut self) {
        while let Ok(packet) = self.queue.try_recv() {
            self.tasks.queued.set(self.tasks.queued.get().saturating_sub(packet.len()));
        }
        let mut tasks = self.tasks.tasks.borrow_mut();
        if tasks.get(&self.key).is_some_and(|task| task.number == self.number) {
            tasks.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(port: u16) -> FlowKey {
        FlowKey { guest: ([10, 0, 2, 15], port).into(), remote: ([1, 1, 1, 1], 80).into() }
    }

    #[tokio::test]
    async fn a_task_that_ended_is_not_in_the_table() {
        let tasks = Rc::new(Tasks::default());
        let mut packets = tasks.open(key(1));
        assert!(tasks.pass(&key(1), b"packet") && !tasks.pass(&key(2), b"packet"));
        assert_eq!(packets.next().await.unwrap(), b"packet");
        tasks.pass(&key(1), b"left");
        drop(packets);
        assert_eq!((tasks.count(), tasks.queued.get()), (0, 0));
    }

    #[tokio::test]
    async fn a_task_that_is_to_end_gets_no_more_packets() {
        let tasks = Rc::new(Tasks::default());
        let mut packets = tasks.open(key(1));
        tasks.retain(|_| false);
        assert_eq!(packets.next().await, None);
        let second = tasks.open(key(1));
        drop(packets);
        assert_eq!(tasks.count(), 1, "the older one does not remove the newer");
        drop(second);
    }

    #[test]
    fn what_waits_is_bounded() {
        let tasks = Rc::new(Tasks::default());
        let places: Vec<_> = (1..=100).map(|port| tasks.open(key(port))).collect();
        let packet = vec![0; 65_000];
        for port in (1..=100).cycle().take(10_000) {
            assert!(tasks.pass(&key(port), &packet));
        }
        assert!(tasks.queued.get() <= QUEUED_BYTES_MAX);
        drop(places);
        assert_eq!(tasks.queued.get(), 0);
    }
}
