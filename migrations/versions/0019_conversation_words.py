"""The words of each conversation, and the facets that filters find it by."""

from alembic import op

revision = "0019"
down_revision = "0018"

OTHERS = r"(select current_user not like 'parley\_users\_%')"
ME = "(select nullif(current_setting('parley.user_id', true), ''))"

TABLE = """
create table conversation_words (
    conversation bigint primary key,
    username text not null,
    words tsvector not null
)
"""
# What app/conversations/words.py writes of a conversation, as it did when this was made.
_TEXT = r"""
to_tsvector('pg_catalog.simple', regexp_replace(
    translate({text}, '!"#$%&''()*+,-./:;<=>?@[\]^_`{{|}}~', repeat(' ', 32)),
    '([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])', ' \1 ', 'g'))
"""
FILL = f"""
insert into conversation_words (conversation, username, words)
select id, username, array_to_tsvector(array_remove(array[
    'U:' || left(nullif(username, ''), 100), 'M:' || model, 'C:' || chatbot_id, 'S:' || source,
    'MC:' || model || E'\\x1f' || chatbot_id, 'MS:' || model || E'\\x1f' || source,
    'CS:' || chatbot_id || E'\\x1f' || source,
    'MCS:' || model || E'\\x1f' || chatbot_id || E'\\x1f' || source], null))
    || case when first_question = last_question then {_TEXT.format(text="first_question")}
    else ts_delete({_TEXT.format(text="first_question")} || 'Q:2'::tsvector
        || {_TEXT.format(text="last_question")}, 'Q') end
from (
    select id, username, left(nullif(model, ''), 100) as model,
        left(nullif(chatbot_id, ''), 100) as chatbot_id, left(nullif(source, ''), 100) as source,
        first_question, last_question
    from conversations) named
"""
# Without a list of what is pending: whoever fills it up would have to empty it.
INDEX = "create index conversation_words_found on conversation_words using gin (words) with (fastupdate = off)"
SECURITY = [
    "alter table conversation_words enable row level security",
    f"create policy others on conversation_words using ({OTHERS})",
    f"create policy users on conversation_words using (username = {ME})",
]


def upgrade() -> None:
    for statement in [TABLE, FILL, INDEX, *SECURITY]:
        op.execute(statement)


def downgrade() -> None:
    raise NotImplementedError("Parley's migrations only go forward; restore a backup to go back.")
