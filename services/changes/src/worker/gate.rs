//! What waits for external validators, before it may enter a worker's queue. Pure: questions go out and answers come in
//! by the caller.
//!
//! A partition's order must hold, so where one transaction waits for its answer, everything behind it in the partition
//! waits too. Other partitions pass by. How much may wait is bounded by the worker's room in memory, which items hold.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::time::Duration;

use millstream_runtime::backoff::Backoff;
use millstream_schemas::stream::Submission;
use tokio::time::Instant;
use uuid::Uuid;

use crate::decide::validator::Rejection;
use crate::item::{Item, MAX_TRANSACTIONS, Owned};

/// Most transactions of a partition that validators are asked about at a time: what fits into a batch.
const ASK_AHEAD: usize = MAX_TRANSACTIONS;
/// Pauses before a partition's questions are asked again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Which transaction, in which attempt: client, `client_seq`, attempt, and the run, since two copies of a store may
/// use the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Question {
    client_id: Uuid,
    client_seq: u64,
    attempt: u32,
    run_id: Uuid,
}

impl Question {
    pub fn of(submission: &Submission) -> Question {
        let &Submission { client_id, client_seq, attempt, run_id, .. } = submission;
        Question { client_id, client_seq, attempt, run_id }
    }
}

/// What the validators said of a transaction: nothing against it, or why not.
pub(crate) type Answer = Option<Rejection>;

/// A partition of which something waits.
#[derive(Debug)]
struct Held {
    /// In stream order; with the key of those that need an answer.
    items: VecDeque<(Option<Question>, Item)>,
    backoff: Backoff,
    /// Not to be asked about before.
    again: Option<Instant>,
}

/// The items before the queue.
#[derive(Debug, Default)]
pub(crate) struct Gate {
    partitions: BTreeMap<u16, Held>,
    /// Questions under way.
    asked: HashSet<Question>,
    /// Answers, kept until the transaction is settled: a resent copy gets the same one.
    answers: HashMap<Question, Answer>,
}

impl Gate {
    /// Takes an item in; `asks` says whether validators have a say in it. Gives it back if nothing keeps it here.
    pub fn push(&mut self, item: Item, asks: bool) -> Option<Item> {
        let key = item.submission.as_ref().filter(|_| asks).map(Question::of);
        if key.is_none() && !self.partitions.contains_key(&item.partition) {
            return Some(item);
        }
        let held = self.partitions.entry(item.partition).or_insert_with(|| Held {
            items: VecDeque::new(),
            backoff: Backoff::new(PAUSES.0, PAUSES.1),
            again: None,
        });
        held.items.push_back((key, item));
        None
    }

    /// What is to be asked now. Each is then under way until [`Gate::answered`].
    pub fn ask(&mut self, now: Instant, mut question: impl FnMut(u16, Question, &Submission)) {
        for (&partition, held) in &mut self.partitions {
            if held.again.is_some_and(|again| now < again) {
                continue;
            }
            held.again = None;
            let waiting = held.items.iter().filter_map(|(key, item)| Some(((*key)?, item.submission.as_ref()?)));
            for (key, submission) in waiting.take(ASK_AHEAD) {
                if !self.answers.contains_key(&key) && self.asked.insert(key) {
                    question(partition, key, submission);
                }
            }
        }
    }

    /// A question came back: with an answer, or with none, so that the partition pauses before it is asked again.
    pub fn answered(&mut self, partition: u16, key: Question, answer: Option<Answer>, now: Instant) {
        self.asked.remove(&key);
        match (answer, self.partitions.get_mut(&partition)) {
            (Some(answer), _) => {
                self.answers.insert(key, answer);
            }
            (None, Some(held)) if held.again.is_none() => held.again = Some(now + held.backoff.next()),
            (None, _) => {}
        }
    }

    /// Hands on, in each partition's order, what waits no more.
    pub fn release(&mut self, mut out: impl FnMut(Item, Answer)) {
        self.partitions.retain(|_, held| {
            while let Some((key, _)) = held.items.front() {
                let answer = match key {
                    None => None,
                    Some(key) => match self.answers.get(key) {
                        None => return true,
                        Some(answer) => {
                            held.backoff.reset();
                            answer.clone()
                        }
                    },
                };
                if let Some((_, item)) = held.items.pop_front() {
                    out(item, answer);
                }
            }
            false
        });
    }

    /// When a partition's pause ends, if one pauses.
    pub fn next(&self) -> Option<Instant> {
        self.partitions.values().filter_map(|held| held.again).min()
    }

    /// The transaction is committed.
    pub fn settled(&mut self, submission: &Submission) {
        if !self.answers.is_empty() {
            self.answers.remove(&Question::of(submission));
        }
    }

    /// Drops what the positions say is done, and what belongs to partitions that are not owned any more.
    pub fn retain(&mut self, owned: &BTreeMap<u16, Owned>) {
        self.partitions.retain(|partition, held| {
            let position = owned.get(partition).map(|state| state.position);
            held.items.retain(|(_, item)| position.is_some_and(|position| item.sequence > position));
            !held.items.is_empty()
        });
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.partitions.is_empty()
    }

    /// Forgets the answers; to be called when nothing waits here nor in the queue.
    pub fn forget(&mut self) {
        self.answers.clear();
    }
}

#[cfg(test)]
mod tests {
    use millstream_schemas::Code;

    use super::*;

    fn item(partition: u16, sequence: u64, attempt: u32) -> Item {
        let submission = Submission {
            client_id: Uuid::from_u128(u128::from(partition)),
            user_id: "u".into(),
            client_seq: sequence,
            attempt,
            run_id: Uuid::nil(),
            previous: None,
            after: Vec::new(),
            changes: Vec::new(),
            traceparent: None,
        };
        Item::of_message(partition, sequence, vec![submission], None).remove(0)
    }

    fn asked(gate: &mut Gate, now: Instant) -> Vec<(u16, Question)> {
        let mut asked = Vec::new();
        gate.ask(now, |partition, key, _| asked.push((partition, key)));
        asked
    }

    fn released(gate: &mut Gate) -> Vec<(u16, u64, bool)> {
        let mut released = Vec::new();
        gate.release(|item, answer| released.push((item.partition, item.sequence, answer.is_some())));
        released
    }

    fn rejection() -> Rejection {
        Rejection { index: 0, change_id: Uuid::nil(), code: Code::BusinessRule, rule: None, message: "no".into() }
    }

    #[test]
    fn a_partition_waits_in_order_and_others_pass() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        assert!(gate.push(item(1, 1, 1), false).is_some(), "nothing to ask, nothing before it");
        for (sequence, asks) in [(2, true), (3, false), (4, true), (5, false)] {
            assert!(gate.push(item(1, sequence, 1), asks).is_none(), "{sequence}");
        }
        assert!(gate.push(item(2, 9, 1), false).is_some(), "another partition");
        let questions = asked(&mut gate, now);
        assert_eq!(questions.iter().map(|(_, key)| key.client_seq).collect::<Vec<_>>(), [2, 4]);
        assert!(asked(&mut gate, now).is_empty(), "under way already");
        // The later answer comes first.
        gate.answered(1, questions[1].1, Some(Some(rejection())), now);
        assert!(released(&mut gate).is_empty());
        gate.answered(1, questions[0].1, Some(None), now);
        assert_eq!(released(&mut gate), [(1, 2, false), (1, 3, false), (1, 4, true), (1, 5, false)]);
        assert!(gate.is_empty());
    }

    #[test]
    fn without_an_answer_the_partition_pauses_and_only_what_is_open_is_asked_again() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        for sequence in [1, 2] {
            gate.push(item(1, sequence, 1), true);
        }
        gate.push(item(2, 1, 1), true);
        let questions = asked(&mut gate, now);
        gate.answered(1, questions[0].1, None, now);
        gate.answered(1, questions[1].1, Some(None), now);
        gate.answered(2, questions[2].1, Some(None), now);
        assert_eq!(released(&mut gate), [(2, 1, false)]);
        let again = gate.next().unwrap();
        assert!(again <= now + PAUSES.0);
        if again > now {
            assert!(asked(&mut gate, now).is_empty());
        }
        assert_eq!(asked(&mut gate, again), [questions[0]]);
        gate.answered(1, questions[0].1, Some(None), again);
        assert_eq!(released(&mut gate), [(1, 1, false), (1, 2, false)]);
    }

    #[test]
    fn answers_hold_until_the_transaction_is_settled() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        gate.push(item(1, 1, 1), true);
        let questions = asked(&mut gate, now);
        gate.answered(1, questions[0].1, Some(Some(rejection())), now);
        assert_eq!(released(&mut gate), [(1, 1, true)]);
        // A resent copy is not asked about; another attempt is.
        gate.push(item(1, 1, 1), true);
        assert!(asked(&mut gate, now).is_empty());
        assert_eq!(released(&mut gate), [(1, 1, true)]);
        gate.push(item(1, 1, 2), true);
        assert_eq!(asked(&mut gate, now).len(), 1);
        gate.settled(item(1, 1, 1).submission.as_ref().unwrap());
        gate.push(item(1, 1, 1), true);
        assert_eq!(asked(&mut gate, now).len(), 1);
    }

    #[test]
    fn no_more_than_a_batch_is_asked_ahead() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        for sequence in 1..=ASK_AHEAD as u64 + 1 {
            gate.push(item(1, sequence, 1), true);
        }
        let questions = asked(&mut gate, now);
        assert_eq!(questions.len(), ASK_AHEAD);
        gate.answered(1, questions[0].1, Some(None), now);
        assert_eq!(released(&mut gate).len(), 1);
        assert_eq!(asked(&mut gate, now).len(), 1);
    }

    #[test]
    fn lost_and_finished_items_leave() {
        let (mut gate, now) = (Gate::default(), Instant::now());
        for (partition, sequence) in [(1, 5), (1, 6), (2, 7)] {
            gate.push(item(partition, sequence, 1), true);
        }
        gate.retain(&BTreeMap::from([(1, Owned { term: 1, position: 5 })]));
        assert_eq!(asked(&mut gate, now).iter().map(|(_, key)| key.client_seq).collect::<Vec<_>>(), [6]);
        gate.retain(&BTreeMap::new());
        assert!(gate.is_empty());
    }
}
