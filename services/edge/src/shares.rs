//! What one user may take of an edge: sessions, hellos, changes, snapshots and catch-ups. What is over a share waits, or is told
//! when to come again; nobody else is affected.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// Of the hellos of a user that are taken at once, this part is taken more in each second.
const HELLOS_SHARE: f64 = 1.0 / 16.0;
/// Changes of a user that are taken at once, and how many more a second.
const CHANGES: Rate = Rate { burst: 20_000.0, per_second: 2_000.0 };
/// Bytes of submissions of a user that are taken at once, and how many more a second.
const BYTES: Rate = Rate { burst: (16 << 20) as f64, per_second: (2 << 20) as f64 };
/// Snapshots with many rows, and with few, that are read for one user at the same time.
const USER_TURNS: usize = 2;
/// The same for all users of an edge.
const LARGE_TURNS: usize = 6;
const SMALL_TURNS: usize = 4;
/// A snapshot of at most this number of rows does not wait for larger ones.
const SMALL_ROWS: u64 = 5_000;
/// Catch-ups of one user at the same time.
const USER_CATCH_UPS: usize = 2;
/// Most of the files for slow clients that one user takes, in KiB.
const USER_SPOOL_KIB: usize = 512 << 10;
/// What may wait for slow clients of one user, in KiB.
pub const USER_UNSENT_KIB: usize = 16 << 10;
/// A user of whom nothing has been seen for this time is forgotten; then its rates are full again.
const FORGOTTEN: Duration = Duration::from_secs(60);
/// The number of users from which on forgotten ones are looked for, and how often.
const MANY_USERS: usize = 1_000;
const SWEEP: Duration = Duration::from_secs(5);

/// How much at once, and how much more in each second.
#[derive(Clone, Copy, Debug)]
struct Rate {
    burst: f64,
    per_second: f64,
}

/// A token bucket. What is taken may be more than is left, so that the largest transaction fits any burst; then it has to be
/// earned before anything else is taken.
#[derive(Debug)]
struct Bucket {
    rate: Rate,
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(rate: Rate, now: Instant) -> Bucket {
        Bucket { rate, left: rate.burst, at: now }
    }

    /// How long it takes until something is left.
    fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + passed * self.rate.per_second).min(self.rate.burst);
        self.at = now;
        (self.left <= 0.0).then(|| Duration::from_secs_f64((1.0 - self.left) / self.rate.per_second))
    }

    fn take(&mut self, amount: usize) {
        self.left -= amount as f64;
    }
}

/// All users of an edge.
pub struct Shares {
    /// Most sessions of a user, and hellos at once.
    sessions: usize,
    hellos: Rate,
    users: Mutex<Users>,
    large: Arc<Semaphore>,
    small: Arc<Semaphore>,
}

#[derive(Default)]
struct Users {
    shares: HashMap<String, Arc<Share>>,
    /// When forgotten ones were looked for.
    swept: Option<Instant>,
}

/// One user's share.
pub struct Share {
    state: Mutex<State>,
    large: Arc<Semaphore>,
    small: Arc<Semaphore>,
    catch_ups: Arc<Semaphore>,
    /// Room in the files for slow clients, in KiB.
    pub spool: Arc<Semaphore>,
    /// Room for what waits for slow clients, in KiB.
    pub unsent: Arc<Semaphore>,
}

struct State {
    sessions: usize,
    hellos: Bucket,
    changes: Bucket,
    bytes: Bucket,
    used: Instant,
}

/// A session's place among those of its user.
pub struct Place(Arc<Share>);

impl std::ops::Deref for Place {
    type Target = Arc<Share>;

    fn deref(&self) -> &Arc<Share> {
        &self.0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.sessions -= 1;
        state.used = Instant::now();
    }
}

/// A snapshot may be read while it lives.
pub struct Turn {
    _user: OwnedSemaphorePermit,
    _edge: OwnedSemaphorePermit,
}

impl Shares {
    /// At most this number of sessions for one user, and of hellos at once.
    pub fn new(sessions: usize, hellos: u32) -> Shares {
        let burst = f64::from(hellos);
        Shares {
            sessions,
            hellos: Rate { burst, per_second: burst * HELLOS_SHARE },
            users: Mutex::default(),
            large: Arc::new(Semaphore::new(LARGE_TURNS)),
            small: Arc::new(Semaphore::new(SMALL_TURNS)),
        }
    }

    /// A place for one more session of a user who has said hello.
    ///
    /// # Errors
    /// There are too many sessions or hellos: how long to wait.
    pub fn enter(&self, user_id: &str) -> Result<Place, Duration> {
        let now = Instant::now();
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = users.swept.is_none_or(|swept| now.saturating_duration_since(swept) > SWEEP);
        if users.shares.len() >= MANY_USERS && is_due {
            users.swept = Some(now);
            users.shares.retain(|_, share| {
                let state = share.state();
                state.sessions > 0 || now.saturating_duration_since(state.used) < FORGOTTEN
            });
        }
        let share =
            users.shares.entry(user_id.to_owned()).or_insert_with(|| Arc::new(Share::new(self.hellos, now))).clone();
        drop(users);
        let mut state = share.state();
        state.used = now;
        if let Some(wait) = state.hellos.wait(now) {
            return Err(wait);
        }
        state.hellos.take(1);
        if state.sessions >= self.sessions {
            return Err(Duration::from_secs(5));
        }
        state.sessions += 1;
        drop(state);
        Ok(Place(share))
    }

    /// The user's turns and the edge's, for snapshots of this size.
    fn turns(&self, share: &Share, rows: u64) -> [Arc<Semaphore>; 2] {
        if rows <= SMALL_ROWS {
            [share.small.clone(), self.small.clone()]
        } else {
            [share.large.clone(), self.large.clone()]
        }
    }

    /// A turn for a snapshot with this number of rows, if there is one at once.
    pub fn try_turn(&self, share: &Share, rows: u64) -> Option<Turn> {
        let [user, edge] = self.turns(share, rows);
        let _user = user.try_acquire_owned().ok()?;
        let _edge = edge.try_acquire_owned().ok()?;
        Some(Turn { _user, _edge })
    }

    /// A turn for a snapshot with this number of rows, behind those of the same user and then behind those of others.
    pub async fn turn(&self, share: &Share, rows: u64) -> Option<Turn> {
        let [user, edge] = self.turns(share, rows);
        let _user = user.acquire_owned().await.ok()?;
        let _edge = edge.acquire_owned().await.ok()?;
        Some(Turn { _user, _edge })
    }
}

impl Share {
    fn new(hellos: Rate, now: Instant) -> Share {
        Share {
            state: Mutex::new(State {
                sessions: 0,
                hellos: Bucket::full(hellos, now),
                changes: Bucket::full(CHANGES, now),
                bytes: Bucket::full(BYTES, now),
                used: now,
            }),
            large: Arc::new(Semaphore::new(USER_TURNS)),
            small: Arc::new(Semaphore::new(USER_TURNS)),
            catch_ups: Arc::new(Semaphore::new(USER_CATCH_UPS)),
            spool: Arc::new(Semaphore::new(USER_SPOOL_KIB)),
            unsent: Arc::new(Semaphore::new(USER_UNSENT_KIB)),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a submission of `changes` changes.
    ///
    /// # Errors
    /// The user's share is used up: how long to wait.
    pub fn submit(&self, changes: usize, bytes: usize) -> Result<(), Duration> {
        let now = Instant::now();
        let mut state = self.state();
        let waits = [state.changes.wait(now), state.bytes.wait(now)];
        if let Some(wait) = waits.into_iter().flatten().max() {
            return Err(wait);
        }
        state.changes.take(changes);
        state.bytes.take(bytes);
        Ok(())
    }

    /// A turn for a catch-up, behind others of the same user.
    pub async fn catch_up(&self) -> Option<OwnedSemaphorePermit> {
        self.catch_ups.clone().acquire_owned().await.ok()
    }
}

/// Sockets whose clients have not shown who they are, of all addresses together.
const STRANGERS: usize = 256;
/// When places are short, the oldest of those that have had theirs for this time makes room.
const COURTESY: Duration = Duration::from_millis(500);
/// How long a new one waits for its place.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(6);

/// Places for sockets whose clients have not shown who they are.
pub struct Strangers {
    per_address: usize,
    /// By the time at which they came.
    places: Arc<Mutex<VecDeque<Stranger>>>,
}

struct Stranger {
    address: IpAddr,
    since: Instant,
    over: Arc<Notify>,
}

/// A socket's place until its client has shown who it is.
pub struct Admission {
    over: Arc<Notify>,
    places: Arc<Mutex<VecDeque<Stranger>>>,
}

impl Admission {
    /// Waits until the place is wanted by others.
    pub async fn is_over(&self) {
        self.over.notified().await;
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|place| !Arc::ptr_eq(&place.over, &self.over));
    }
}

impl Strangers {
    /// At most this number for one address.
    pub fn new(per_address: usize) -> Strangers {
        Strangers { per_address, places: Arc::default() }
    }

    /// Waits for a place: that of the oldest stranger, if there is no other. None in time.
    pub async fn admit(&self, address: Option<IpAddr>) -> Option<Admission> {
        let address = network(address.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
        let give_up = Instant::now() + ADMISSION_TIMEOUT;
        loop {
            let wait = match self.place(address, Instant::now()) {
                Ok(admission) => return Some(admission),
                Err(wait) => wait,
            };
            if Instant::now() + wait > give_up {
                return None;
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// A place, or how long to wait.
    fn place(&self, address: IpAddr, now: Instant) -> Result<Admission, Duration> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let of_address = places.iter().filter(|place| place.address == address).count();
        let oldest = if of_address >= self.per_address {
            places.iter().position(|place| place.address == address)
        } else {
            (places.len() >= STRANGERS).then_some(0)
        };
        if let Some(oldest) = oldest {
            let had = now.saturating_duration_since(places[oldest].since);
            if had < COURTESY {
                return Err(COURTESY - had);
            }
            if let Some(oldest) = places.remove(oldest) {
                oldest.over.notify_one();
            }
        }
        let over = Arc::new(Notify::new());
        places.push_back(Stranger { address, since: now, over: over.clone() });
        Ok(Admission { over, places: self.places.clone() })
    }
}

/// What counts as one address: of IPv6 the network that one customer has (RFC 6177).
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::full(Rate { burst: 10.0, per_second: 2.0 }, start);
        assert_eq!(bucket.wait(start), None);
        bucket.take(9);
        assert_eq!(bucket.wait(start), None, "one is left, and a larger amount may be taken of it");
        bucket.take(5);
        assert_eq!(bucket.wait(start), Some(Duration::from_millis(2_500)));
        assert_eq!(bucket.wait(start + Duration::from_millis(2_500)), None);
        assert_eq!(bucket.wait(start + Duration::from_secs(3_600)), None);
        bucket.take(10);
        assert!(bucket.wait(start + Duration::from_secs(3_600)).is_some(), "never more than the burst");
    }

    fn one_share() -> Share {
        Share::new(Rate { burst: 1.0, per_second: 1.0 }, Instant::now())
    }

    #[test]
    fn sessions_and_hellos_of_a_user_are_limited() {
        let shares = Shares::new(3, 128);
        let places: Vec<Place> = (0..3).map(|_| shares.enter("a").ok().unwrap()).collect();
        assert!(shares.enter("a").is_err());
        assert!(shares.enter("b").is_ok(), "another user's");
        drop(places);
        let entered = (0..200).filter(|_| shares.enter("a").is_ok()).count();
        assert!((120..=128).contains(&entered), "{entered} of 200 hellos");
    }

    #[test]
    fn changes_and_bytes_have_a_budget() {
        let share = one_share();
        let taken = (0..100).take_while(|_| share.submit(900, 1).is_ok()).count();
        assert!((22..=24).contains(&taken), "{taken} transactions of 900 changes");
        let share = one_share();
        let taken = (0..100).take_while(|_| share.submit(1, 512 << 10).is_ok()).count();
        assert!((32..=34).contains(&taken), "{taken} transactions of 512 KiB");
        assert!(share.submit(1, 1).is_err_and(|wait| wait < Duration::from_secs(1)));
    }

    #[tokio::test]
    async fn small_snapshots_do_not_wait_for_large_ones_nor_users_for_one_user() {
        let (shares, a, b) = (Shares::new(1, 128), one_share(), one_share());
        let _first = (shares.try_turn(&a, 100_000).unwrap(), shares.try_turn(&a, 100_000).unwrap());
        assert!(shares.try_turn(&a, 100_000).is_none(), "two of a user at the same time");
        assert!(shares.try_turn(&a, SMALL_ROWS).is_some());
        assert!(shares.try_turn(&b, 100_000).is_some());
        let others: Vec<Share> = (0..3).map(|_| one_share()).collect();
        let turns: Vec<Turn> = others.iter().flat_map(|user| shares.try_turn(user, 100_000)).collect();
        let more = shares.try_turn(&b, 100_000);
        assert_eq!((turns.len(), more.is_some()), (3, true));
        assert!(shares.try_turn(&one_share(), 100_000).is_none(), "six on the edge");
    }

    #[test]
    fn strangers_make_room_for_each_other_once_they_have_had_their_time() {
        let strangers = Strangers::new(2);
        let (a, b) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2]));
        let now = Instant::now();
        let first = strangers.place(a, now).ok().unwrap();
        let _second = strangers.place(a, now).ok().unwrap();
        assert!(strangers.place(a, now).is_err_and(|wait| wait == COURTESY));
        assert!(strangers.place(b, now).is_ok(), "another address");
        let _third = strangers.place(a, now + COURTESY).ok().unwrap();
        assert_eq!(strangers.places.lock().unwrap().len(), 2);
        drop(first);
        assert_eq!(strangers.places.lock().unwrap().len(), 2, "its place is another's");
        let many: Vec<Admission> =
            (0..STRANGERS as u32 - 2).map(|n| strangers.place(IpAddr::V4(n.into()), now).ok().unwrap()).collect();
        assert!(strangers.place(b, now).is_err());
        drop(many);
        assert!(strangers.place(b, now).is_ok());
    }

    #[test]
    fn a_network_counts_as_one_address() {
        let of = |text: &str| network(text.parse().unwrap()).to_string();
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::");
        assert_eq!(of("::ffff:10.0.0.1"), "10.0.0.1");
        assert_eq!(of("10.0.0.1"), "10.0.0.1");
    }
}
