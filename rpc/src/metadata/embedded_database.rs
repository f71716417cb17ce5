//! The file of the embedded store: one redb database, one durable redb transaction per commit. What the rows hold
//! stands in `embedded_codec`.

use super::embedded_codec::{Header, decode_event, decode_held, encode_event, encode_held};
use super::embedded_server::EmbeddedError;
use super::store::{Change, Commit, Held, LeaseChange, Saved};
use super::{Event, LeaseId, Revision};
use redb::{ReadableDatabase, ReadableTable, TableDefinition};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

const FILE_NAME: &str = "metadata.redb";
const HEADER_KEY: u8 = 0;
const HEADER: TableDefinition<u8, &[u8]> = TableDefinition::new("header");
const KEYS: TableDefinition<&str, &[u8]> = TableDefinition::new("keys");
const LEASES: TableDefinition<i64, u32> = TableDefinition::new("leases");
const HISTORY: TableDefinition<(i64, u32), &[u8]> = TableDefinition::new("history");

pub struct Database {
    file: PathBuf,
    database: redb::Database,
}

impl Database {
    /// Makes the directory and the file where they are missing, and keeps other processes out.
    pub fn open(directory: &Path) -> Result<(Self, Saved), EmbeddedError> {
        let file = directory.join(FILE_NAME);
        let io = |error: std::io::Error| EmbeddedError::File { file: file.clone(), because: error.to_string() };
        std::fs::create_dir_all(directory).map_err(io)?;
        let database = redb::Database::create(&file).map_err(|error| match error {
            redb::DatabaseError::DatabaseAlreadyOpen => EmbeddedError::InUse { file: file.clone() },
            other => EmbeddedError::File { file: file.clone(), because: other.to_string() },
        })?;
        // The file's name has to survive a power cut as well as its content.
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(io)?;
        let opened = Self { file, database };
        let saved = opened.load()?;
        Ok((opened, saved))
    }

    /// Durable when it returns. `last_lease` and `oldest` are the store's, before the commit is applied.
    pub fn commit(&self, commit: &Commit, last_lease: LeaseId, oldest: Revision) -> Result<(), EmbeddedError> {
        self.write(commit, last_lease, oldest).map_err(|error| self.failed(&error))
    }

    fn write(&self, commit: &Commit, mut last_lease: LeaseId, oldest: Revision) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut leases = transaction.open_table(LEASES)?;
            match commit.lease {
                Some(LeaseChange::Granted(id, ttl)) => {
                    let seconds = u32::try_from(ttl.as_secs()).expect("leases are granted in seconds that fit 32 bits");
                    leases.insert(id.0, seconds)?;
                    last_lease = id;
                }
                Some(LeaseChange::Ended(id)) => drop(leases.remove(id.0)?),
                None => {}
            }
            let mut keys = transaction.open_table(KEYS)?;
            let mut history = transaction.open_table(HISTORY)?;
            for (index, change) in (0..).zip(&commit.changes) {
                history.insert((commit.revision.0, index), encode_event(&change.event).as_slice())?;
                match held_after(change) {
                    Some(held) => drop(keys.insert(change.event.key(), encode_held(&held).as_slice())?),
                    None => drop(keys.remove(change.event.key())?),
                }
            }
            // What the store has let go of with its last commit goes with this one.
            history.retain_in(..(oldest.0, 0), |_, _| false)?;
            let header = Header { revision: commit.revision, last_lease, oldest };
            transaction.open_table(HEADER)?.insert(HEADER_KEY, header.encode().as_slice())?;
        }
        transaction.commit()?;
        Ok(())
    }

    fn load(&self) -> Result<Saved, EmbeddedError> {
        if self.is_new().map_err(|error| self.failed(&error))? {
            let saved = Saved::default();
            let nothing = Commit { revision: saved.revision, changes: Vec::new(), lease: None };
            self.commit(&nothing, saved.last_lease, saved.oldest)?;
            return Ok(saved);
        }
        self.read().map_err(|error| self.failed(&error))?.map_err(|because| self.refuse(because))
    }

    /// A file of ours has its header since its first commit.
    fn is_new(&self) -> Result<bool, redb::Error> {
        let transaction = self.database.begin_read()?;
        let mut tables = transaction.list_tables()?;
        Ok(tables.next().is_none())
    }

    /// The inner error says what is wrong with the content.
    fn read(&self) -> Result<Result<Saved, String>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let header = match transaction.open_table(HEADER) {
            Ok(table) => table.get(HEADER_KEY)?,
            Err(error) => return Ok(Err(format!("it has no header of a metadata store ({error})"))),
        };
        let header = match header.map(|header| Header::decode(header.value())) {
            Some(Ok(header)) => header,
            Some(Err(because)) => return Ok(Err(because)),
            None => return Ok(Err("its header is empty".to_owned())),
        };
        let mut saved = Saved {
            revision: header.revision,
            last_lease: header.last_lease,
            oldest: header.oldest,
            ..Saved::default()
        };
        for row in transaction.open_table(KEYS)?.iter()? {
            let (key, held) = row?;
            match decode_held(held.value()) {
                Ok(held) => saved.keys.insert(key.value().to_owned(), held),
                Err(because) => return Ok(Err(because)),
            };
        }
        for row in transaction.open_table(LEASES)?.iter()? {
            let (id, seconds) = row?;
            saved.leases.insert(LeaseId(id.value()), Duration::from_secs(u64::from(seconds.value())));
        }
        for row in transaction.open_table(HISTORY)?.range((header.oldest.0, 0)..)? {
            let (at, event) = row?;
            let revision = Revision(at.value().0);
            match decode_event(revision, event.value()) {
                Ok(event) => push(&mut saved.history, revision, event),
                Err(because) => return Ok(Err(because)),
            }
        }
        Ok(Ok(saved))
    }

    fn failed(&self, error: &redb::Error) -> EmbeddedError {
        EmbeddedError::File { file: self.file.clone(), because: error.to_string() }
    }

    fn refuse(&self, because: String) -> EmbeddedError {
        EmbeddedError::Format { file: self.file.clone(), because }
    }
}

fn held_after(change: &Change) -> Option<Held> {
    match &change.event {
        Event::Put(entry) => Some(Held {
            value: entry.value.clone(),
            create_revision: entry.create_revision,
            mod_revision: entry.mod_revision,
            lease: change.lease,
        }),
        Event::Deleted { .. } => None,
    }
}

fn push(history: &mut Vec<(Revision, Vec<Event>)>, revision: Revision, event: Event) {
    match history.last_mut() {
        Some((last, events)) if *last == revision => events.push(event),
        _ => history.push((revision, vec![event])),
    }
}

#[cfg(test)]
mod tests {
    use super::super::store::Store;
    use super::super::{Transaction, Write};
    use super::*;
    use crate::runtime::Instant;
    use torus_schema::limits::METADATA_HISTORY_REVISIONS_MAX;

    fn commit(database: &Database, store: &mut Store, write: Write) {
        let transaction = Transaction { writes: vec![write], ..Transaction::default() };
        let commit = store.prepare(&transaction).expect("well formed").expect("no compares");
        database.commit(&commit, LeaseId(0), store.oldest()).expect("a commit");
        store.apply(commit, Instant::default());
    }

    fn put(key: &str) -> Write {
        Write::Put { key: key.to_owned(), value: b"value".to_vec(), lease: None }
    }

    #[test]
    fn what_was_committed_is_there_again_history_included() {
        let directory = tempfile::tempdir().expect("a directory");
        let (database, saved) = Database::open(directory.path()).expect("a new store");
        let mut store = Store::restore(saved, Instant::default());
        commit(&database, &mut store, put("a"));
        commit(&database, &mut store, put("b"));
        commit(&database, &mut store, Write::Delete { key: "a".to_owned() });
        drop(database);
        let (_database, saved) = Database::open(directory.path()).expect("the same store");
        let again = Store::restore(saved, Instant::default());
        assert_eq!(again.range(""), store.range(""));
        assert_eq!(again.events("", Revision(1)), store.events("", Revision(1)));
    }

    #[test]
    fn a_second_opener_is_refused_and_told_where() {
        let directory = tempfile::tempdir().expect("a directory");
        let _first = Database::open(directory.path()).expect("a new store");
        let refusal = Database::open(directory.path()).err().expect("in use").to_string();
        assert!(refusal.contains("in use") && refusal.contains("metadata.redb"), "{refusal}");
    }

    #[test]
    fn a_store_of_another_format_version_is_refused() {
        let directory = tempfile::tempdir().expect("a directory");
        let (database, _) = Database::open(directory.path()).expect("a new store");
        let mut header = Header { revision: Revision(1), last_lease: LeaseId(0), oldest: Revision(1) }.encode();
        header[8] = 99;
        let transaction = database.database.begin_write().expect("a transaction");
        transaction.open_table(HEADER).expect("its table").insert(HEADER_KEY, header.as_slice()).expect("a row");
        transaction.commit().expect("a commit");
        drop(database);
        let refusal = Database::open(directory.path()).err().expect("another version").to_string();
        assert!(refusal.contains("format version is 99, this program knows 1"), "{refusal}");
    }

    #[test]
    fn a_redb_database_of_somebody_else_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().expect("a directory");
        let other = redb::Database::create(directory.path().join(FILE_NAME)).expect("a database");
        let transaction = other.begin_write().expect("a transaction");
        transaction.open_table(TableDefinition::<&str, u64>::new("theirs")).expect("their table");
        transaction.commit().expect("a commit");
        drop(other);
        let refusal = Database::open(directory.path()).err().expect("not ours").to_string();
        assert!(refusal.contains("no header of a metadata store"), "{refusal}");
    }

    #[test]
    fn the_file_forgets_the_history_that_the_store_forgets() {
        let directory = tempfile::tempdir().expect("a directory");
        let saved = Database::open(directory.path()).expect("a new store").1;
        let mut store = Store::restore(saved, Instant::default());
        // Only the last commits go to the file: four thousand durable ones would take a minute.
        for _ in 0..METADATA_HISTORY_REVISIONS_MAX {
            let transaction = Transaction { writes: vec![put("key")], ..Transaction::default() };
            let commit = store.prepare(&transaction).expect("well formed").expect("no compares");
            store.apply(commit, Instant::default());
        }
        let (database, _) = Database::open(directory.path()).expect("the same store");
        for _ in 0..3 {
            commit(&database, &mut store, put("key"));
        }
        drop(database);
        let (_, saved) = Database::open(directory.path()).expect("the same store");
        assert_eq!(saved.oldest.0 + 1, store.oldest().0, "one commit behind");
        assert!(saved.history.iter().all(|(revision, _)| *revision >= saved.oldest));
    }
}
