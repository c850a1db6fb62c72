use super::*;

fn entry(client_seq: u64) -> Entry {
    Entry { client_seq, text: format!("#{client_seq}") }
}

fn entries(seqs: std::ops::RangeInclusive<u64>) -> Vec<Entry> {
    seqs.map(entry).collect()
}

/// Sequences that are sent; a load is written as 1,000 + the sequence before it.
fn sent(outputs: &[Output]) -> Vec<u64> {
    outputs
        .iter()
        .filter_map(|output| match output {
            Output::Send(entry) => Some(entry.client_seq),
            Output::Load { after, .. } => Some(1_000 + after),
            Output::Mark { .. } => None,
        })
        .collect()
}

#[test]
fn nothing_is_sent_before_the_session_and_everything_after() {
    let mut outbox = Outbox::new(3, 0);
    assert_eq!(sent(&outbox.handle(Input::Recorded(entries(4..=4)), 0)), [] as [u64; 0]);
    assert_eq!(sent(&outbox.handle(Input::Connected { last_seq: 0, window: 10 }, 0)), [1_000]);
    assert_eq!(sent(&outbox.handle(Input::Loaded(entries(1..=4)), 0)), [1, 2, 3, 4]);
    assert_eq!(sent(&outbox.handle(Input::Recorded(entries(5..=5)), 0)), [5]);
}

#[test]
fn the_window_bounds_what_is_in_flight() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 2 }, 0);
    assert_eq!(sent(&outbox.handle(Input::Recorded(entries(1..=5)), 0)), [1, 2]);
    assert_eq!(sent(&outbox.handle(Input::Accepted { client_seq: 1 }, 0)), [3]);
    assert_eq!(outbox.in_flight(), 2);
    assert_eq!(sent(&outbox.handle(Input::Accepted { client_seq: 3 }, 0)), [4, 5]);
}

#[test]
fn a_cut_goes_on_behind_the_ledger() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=5)), 0);
    outbox.handle(Input::Accepted { client_seq: 4 }, 0);
    outbox.handle(Input::Disconnected, 0);
    assert_eq!(sent(&outbox.handle(Input::Connected { last_seq: 2, window: 9 }, 0)), [1_002]);
    assert_eq!(sent(&outbox.handle(Input::Loaded(entries(3..=5)), 0)), [3, 4, 5]);
}

#[test]
fn a_lost_record_event_is_made_up_for_by_the_poll() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    assert_eq!(sent(&outbox.handle(Input::Recorded(entries(2..=2)), 0)), [1_000], "1 was lost: nothing overtakes it");
    assert_eq!(sent(&outbox.handle(Input::Loaded(entries(1..=2)), 0)), [1, 2]);
    assert_eq!(sent(&outbox.handle(Input::Known { last: 3 }, 0)), [1_002]);
}

#[test]
fn a_refusal_pauses_and_resends_from_the_first_unaccepted() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=3)), 0);
    outbox.handle(Input::Accepted { client_seq: 1 }, 0);
    assert_eq!(sent(&outbox.handle(Input::Refused { retry_after_ms: Some(700) }, 0)), [] as [u64; 0]);
    outbox.handle(Input::Refused { retry_after_ms: None }, 1);
    assert_eq!(outbox.poll_timeout(), Some(700), "the refusals of those behind do not lengthen the pause");
    assert_eq!(sent(&outbox.handle(Input::Tick, 699)), [] as [u64; 0]);
    assert_eq!(sent(&outbox.handle(Input::Tick, 700)), [1_001]);
    assert_eq!(sent(&outbox.handle(Input::Loaded(entries(2..=3)), 700)), [2, 3]);
}

/// An edge that has too much to do says how long to wait; whatever else happens meanwhile, nothing is sent before that.
#[test]
fn nothing_cuts_a_pause_short() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=4)), 0);
    let none = [] as [u64; 0];
    assert_eq!(sent(&outbox.handle(Input::Refused { retry_after_ms: Some(60_000) }, 0)), none);
    let meanwhile = [
        Input::Refused { retry_after_ms: None },
        Input::Refused { retry_after_ms: Some(10) },
        Input::Lost,
        Input::Recorded(entries(5..=5)),
        Input::Known { last: 6 },
        Input::Tick,
        Input::Disconnected,
        Input::Connected { last_seq: 0, window: 9 },
        Input::Confirmed { client_seq: 1 },
        Input::Tick,
    ];
    for (n, input) in meanwhile.into_iter().enumerate() {
        assert_eq!(sent(&outbox.handle(input.clone(), 1_000 + n as u64)), none, "{input:?}");
    }
    assert_eq!(sent(&outbox.handle(Input::Tick, 59_999)), none, "through both stalls");
    assert_eq!(sent(&outbox.handle(Input::Tick, 60_000)), [1_001]);
    assert_eq!(sent(&outbox.handle(Input::Loaded(entries(2..=6)), 60_000)), [2, 3, 4, 5, 6]);
}

#[test]
fn what_is_accepted_during_a_pause_is_not_sent_again() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=5)), 0);
    // 4 and 5 are refused while 1 to 3 are on their way to the broker.
    outbox.handle(Input::Refused { retry_after_ms: Some(500) }, 0);
    outbox.handle(Input::Accepted { client_seq: 3 }, 100);
    assert_eq!(sent(&outbox.handle(Input::Tick, 500)), [1_003]);
}

#[test]
fn a_pause_has_a_limit() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=1)), 0);
    outbox.handle(Input::Refused { retry_after_ms: Some(u64::MAX) }, 7);
    assert_eq!(sent(&outbox.handle(Input::Tick, 7 + RETRY_AFTER_CAP_MS - 1)), [] as [u64; 0]);
    assert_eq!(sent(&outbox.handle(Input::Tick, 7 + RETRY_AFTER_CAP_MS)), [1_000]);
}

#[test]
fn silence_is_answered_by_sending_again() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=2)), 0);
    assert_eq!(sent(&outbox.handle(Input::Tick, ACCEPT_STALL_MS)), [1_000]);
    outbox.handle(Input::Loaded(entries(1..=2)), ACCEPT_STALL_MS);
    let now = ACCEPT_STALL_MS;
    outbox.handle(Input::Accepted { client_seq: 2 }, now);
    assert_eq!(outbox.poll_timeout(), Some(now + CONFIRM_STALL_MS));
    assert_eq!(sent(&outbox.handle(Input::Tick, now + CONFIRM_STALL_MS)), [1_000]);
    outbox.handle(Input::Loaded(entries(1..=2)), now + CONFIRM_STALL_MS);
    outbox.handle(Input::Accepted { client_seq: 2 }, now + CONFIRM_STALL_MS);
    outbox.handle(Input::Confirmed { client_seq: 2 }, now + CONFIRM_STALL_MS);
    assert_eq!(outbox.poll_timeout(), None);
    assert!(!outbox.is_uploading());
}

#[test]
fn an_empty_store_is_not_asked_in_a_loop() {
    let mut outbox = Outbox::new(5, 0);
    assert_eq!(sent(&outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0)), [1_000]);
    assert_eq!(sent(&outbox.handle(Input::Loaded(vec![]), 0)), [] as [u64; 0]);
    assert_eq!(outbox.poll_timeout(), Some(LOAD_RETRY_MS));
    assert_eq!(sent(&outbox.handle(Input::Tick, LOAD_RETRY_MS)), [1_000]);
}

#[test]
fn accepted_beyond_what_was_sent_skips_nothing() {
    let mut outbox = Outbox::new(0, 0);
    outbox.handle(Input::Connected { last_seq: 0, window: 9 }, 0);
    outbox.handle(Input::Recorded(entries(1..=1)), 0);
    outbox.handle(Input::Accepted { client_seq: u64::MAX }, 0);
    assert_eq!(sent(&outbox.handle(Input::Recorded(entries(2..=2)), 0)), [2]);
}

/// A server that applies only what follows its ledger, a link that loses and cuts, a store that records all the while:
/// whatever happens, all arrive, in order.
#[test]
fn simulation() {
    for seed in 1..=300u64 {
        let mut random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut next = move |bound: u64| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random % bound
        };
        let (mut stored, mut ledger, mut accepted, mut confirmed) = (0u64, 0u64, 0u64, 0u64);
        let mut outbox = Outbox::new(0, 0);
        let mut now = 0u64;
        let mut online = false;
        let mut queue: VecDeque<Output> = VecDeque::new();
        for step in 0..20_000 {
            now += next(50);
            // After a while of trouble, calm: then everything must drain.
            let calm = step > 5_000;
            let input = match next(if calm { 8 } else { 12 }) {
                0 if stored < 200 => {
                    stored += 1;
                    if next(4) > 0 { Input::Recorded(vec![entry(stored)]) } else { Input::Known { last: stored } }
                }
                1 if !online => {
                    online = true;
                    queue.clear();
                    accepted = ledger;
                    Input::Connected { last_seq: ledger, window: 1 + next(8) as u32 }
                }
                2 if accepted < ledger => {
                    accepted = ledger;
                    Input::Accepted { client_seq: accepted }
                }
                3 if confirmed < ledger => {
                    confirmed += 1 + next(ledger - confirmed);
                    Input::Confirmed { client_seq: confirmed }
                }
                4 => Input::Known { last: stored },
                8 if online => {
                    online = false;
                    queue.clear();
                    Input::Disconnected
                }
                9 if online => match next(3) {
                    0 => Input::Lost,
                    _ => Input::Refused { retry_after_ms: Some(next(100)) },
                },
                _ => Input::Tick,
            };
            let mut inputs = VecDeque::from([input]);
            while let Some(input) = inputs.pop_front() {
                queue.extend(outbox.handle(input, now));
                while let Some(output) = queue.pop_front() {
                    match output {
                        Output::Send(entry) => {
                            let lost = !calm && next(20) == 0;
                            if online && !lost && entry.client_seq == ledger + 1 {
                                ledger += 1;
                            }
                        }
                        Output::Load { after, limit } => {
                            let from = (after + 1).max(confirmed + 1);
                            let to = stored.min(from + (limit as u64).min(next(6) + 1) - 1);
                            inputs.push_back(Input::Loaded((from..=to).map(entry).collect()));
                        }
                        Output::Mark { sent, accepted } => assert!(accepted <= sent, "seed {seed}"),
                    }
                }
            }
            assert!(confirmed <= ledger && ledger <= stored, "seed {seed}");
        }
        assert_eq!((ledger, confirmed), (stored, stored), "seed {seed}");
    }
}
