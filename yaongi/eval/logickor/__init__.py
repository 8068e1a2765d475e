"""LogicKor: answers of a model in three modes, a judge that scores them, and the means. Its texts are the clone's."""
